"""The training data of TinyLLaVA-Video-R1 (nextqa_0-30s.jsonl: 5,496 multiple choice questions of NextQA).

JSON Lines: ``problem`` (the question with its options in the text, below a line "Options:"), ``solution``
("<answer>C</answer>") and ``video_filename`` ("./NextQA/NExTVideo/1006/8968804598.mp4"), below the folder
that holds the file. The options stay where the author put them; they are also read, to check the answer.
"""

import re

from keytoken.data.prepare.converters import Converter, Values, answer_text, optional_text, text
from keytoken.data.prepare.samples import MULTIPLE_CHOICE, Draft, RowProblem, naming

_OPTION = re.compile(r"\s*([A-Z])[.)]\s*(\S.*)")


def _convert(values: Values) -> Draft:
    media, item_id = text(values, "video_filename"), optional_text(values, "id", "problem_id")
    with naming(media, item_id):
        problem = text(values, "problem")
        return Draft(
            media=media,
            kind="video",
            question=problem,
            answer=answer_text(text(values, "solution")),
            options=_options_within(problem),
            problem_type=MULTIPLE_CHOICE,
            item_id=item_id,
            data_source="tinyllava_video_r1",
            options_inline=True,
        )


def _options_within(problem: str) -> tuple[str, ...]:
    """The lettered lines at the end of a question.

    Raises:
        RowProblem: There are fewer than two, or their letters are not A, B, C, ...
    """
    matches = [_OPTION.fullmatch(line) for line in problem.split("\n")]
    found = [(match[1], match[2].strip()) for match in matches if match]
    letters = "".join(letter for letter, _ in found)
    if len(found) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found)]:
        raise RowProblem(
            "options missing",
            f"the question has the options {letters or 'none'}; write them as lines 'A. ...'",
        )
    return tuple(option for _, option in found)


CONVERTER = Converter(
    name="tinyllava_video_r1",
    title="TinyLLaVA-Video-R1 style JSON Lines",
    source="ZhangXJ199/TinyLLaVA-Video-R1, train.py at 578edd4; verl-project/verl, "
    "examples/data_preprocess/tinyllava_video_r1.py at 7f125af",
    convert=_convert,
    unique_ids=False,
)
