"""Video-R1-260k and files of its form, such as Video-R1-Holmes-16k and the MMVU file of TW-GRPO.

One JSON list with an object for each question: ``problem_id``, ``problem``, ``data_type`` (image or video),
``problem_type`` (multiple choice, numerical, OCR, free-form, regression), ``options`` ("A. ...", "B. ..."),
``solution`` ("<answer>A</answer>"), ``path`` ("./NeXT-QA/.../1.mp4"; TW-GRPO calls it ``video``) and
``data_source``. ``process``, a written-out reasoning, is not used.

Paths are below the folder of the data set even where they begin with a slash: the published loaders append
them to that folder as text, and so does this one, unless such a path lies below ``media_root`` already.
"""

from pathlib import PurePosixPath

from keytoken.data.headers import MediaKind
from keytoken.data.prepare.converters import Converter, Values, answer_text, option_texts, optional_text, text
from keytoken.data.prepare.samples import MULTIPLE_CHOICE, Draft, RowProblem, naming

_KINDS: dict[str, MediaKind] = {"video": "video", "image": "image"}


def _convert(values: Values) -> Draft:
    kind = _KINDS.get(text(values, "data_type").strip().lower())
    if kind is None:
        raise RowProblem("wrong type", f"data_type is {values['data_type']!r}; use 'video' or 'image'")
    problem_type = text(values, "problem_type").strip()
    path, item_id = text(values, "path", kind), optional_text(values, "problem_id")
    with naming(path, item_id):
        return Draft(
            media=path,
            kind=kind,
            question=text(values, "problem"),
            answer=answer_text(text(values, "solution")),
            options=option_texts(values, "options") if problem_type == MULTIPLE_CHOICE else (),
            problem_type=problem_type,
            item_id=item_id,
            data_source=_collection(optional_text(values, "data_source"), path),
            slash_is_root=True,
        )


def _collection(data_source: str, path: str) -> str:
    """The collection: the field, or the first folder of the path where the field is a link to one video."""
    if data_source and "://" not in data_source:
        return data_source
    folders = [part for part in PurePosixPath(path).parts[:-1] if part not in (".", "/")]
    return folders[0] if folders else "video_r1"


CONVERTER = Converter(
    name="video_r1",
    title="Video-R1 style JSON",
    source="tulerfeng/Video-R1 (Video-R1-260k.json) and its public loaders, read in November 2026",
    convert=_convert,
    unique_ids=False,
)
