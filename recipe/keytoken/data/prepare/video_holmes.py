"""The training set of Video-Holmes (train_Video-Holmes.json: 1,551 questions on 233 videos).

One JSON list; ``video ID``, ``Question ID`` (counts within a video), ``Question Type`` (SR, IMC, TCI, TA,
MHR, PAR, CTI), ``Question``, ``Options`` (letters to texts), ``Answer`` (a letter), ``Explanation``.
The video is ``<video ID>.mp4``: ``media_root`` is the folder that holds the videos
(Benchmark/videos/videos_cropped as unpacked). The test set has the same form; a run trained on it cannot be
evaluated with it, which ``against=video_holmes:...`` finds.
"""

from keytoken.data.prepare.converters import Converter, Values, option_texts, optional_text, text
from keytoken.data.prepare.samples import MULTIPLE_CHOICE, Draft, naming


def _convert(values: Values) -> Draft:
    video = text(values, "video ID").strip()
    media, item_id = f"{video}.mp4", f"{video}/{text(values, 'Question ID')}"
    with naming(media, item_id):
        return Draft(
            media=media,
            kind="video",
            question=text(values, "Question"),
            answer=text(values, "Answer"),
            options=option_texts(values, "Options"),
            problem_type=MULTIPLE_CHOICE,
            item_id=item_id,
            data_source="video_holmes",
            category=optional_text(values, "Question Type"),
        )


CONVERTER = Converter(
    name="video_holmes",
    title="Video-Holmes training set",
    source="TencentARC/Video-Holmes, README at 09dbc6e and example questions at 7bb2ed0",
    convert=_convert,
)
