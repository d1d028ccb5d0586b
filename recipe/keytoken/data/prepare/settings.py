"""The settings of ``keytoken data prepare``."""

from dataclasses import dataclass, field
from typing import Literal

from keytoken.data.prepare import CONVERTERS
from keytoken.data.sampling_words import SAMPLING
from keytoken.errors import ConfigurationError

_NAME_ONE = (
    f"name a converter: {', '.join(CONVERTERS)}; such as keytoken data prepare folder source=my_clips "
    "out=data/train"
)


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The words of ``keytoken data prepare``.

    Attributes:
        name: The converter, one word.
        source: The file of questions; for a folder the one table in it.
        out: Folder for the dataset; must not exist yet.
        media_root: Folder that all media lie below; null for the folder of the source.
        limit: Take the first rows only; null for all.
        split: Name of the split and of the Parquet file.
        against: Test sets, as BENCHMARK:FILE or as prepared Parquet files.
        overlap: What happens to rows that a test set holds as well. "stop" leaves the choice to a person.
        check: "headers" opens every file and reads its length, "decode" also reads its frames as training
            would, "none" sees only that it exists.
        sampling: The sampling contract that vision tokens are counted by: a preset, or the file of a run or
            checkpoint, with or without changed keys (``sampling.max_frames=8``).
        style: How the questions are asked, see :func:`keytoken.scoring.prompts.render`.
        checksums: "quick" hashes size and three parts of each file, "full" all of it.
        encoding: Of the source.
        jobs: Files inspected at a time; null for one a core, at most 8.
        limit_s: Seconds allowed for one file.
        overwrite: Replace a dataset that was prepared into ``out`` before.
    """

    name: tuple[str, ...] = field(metadata={"if_missing": _NAME_ONE})
    source: str
    out: str
    media_root: str | None = None
    limit: int | None = None
    split: str = "train"
    against: tuple[str, ...] = ()
    overlap: Literal["stop", "drop", "keep"] = "stop"
    check: Literal["headers", "decode", "none"] = "headers"
    sampling: str = field(default="video_r1_16f", metadata=SAMPLING)
    style: str = "reasoning"
    checksums: Literal["quick", "full"] = "quick"
    encoding: str = "utf-8"
    jobs: int | None = None
    limit_s: float = 60.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if len(self.name) != 1:
            raise ConfigurationError(f"data prepare: name one converter, not {' and '.join(self.name)}")
        for key in ("limit", "jobs", "limit_s"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigurationError(f"data prepare: {key} is {value}; give a number above 0")
        if not self.split or set(self.split) & set("/\\\0"):
            raise ConfigurationError(f"data prepare: split is {self.split!r}; it becomes a file name")
        if self.check == "none" and self.checksums == "full":
            raise ConfigurationError("data prepare: check=none opens no file; checksums=full needs headers")
