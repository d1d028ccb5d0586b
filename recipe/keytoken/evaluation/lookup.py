"""Whether the media of the questions are there, asked before an engine starts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from keytoken.errors import DataError
from keytoken.evaluation.rows import Job, media_of
from keytoken.words import number_of


def look_for_media(
    jobs: Sequence[Job], root: Path | None, max_failures: int, announce: Callable[[str], None]
) -> None:
    """Look for the file of every question that will be shown one; none is opened.

    Args:
        jobs: What will be asked.
        root: The media root; None where the questions name their own.
        max_failures: Failed answers with which a run goes on.
        announce: Prints a line.

    Raises:
        DataError: no question has its media, or so many have none that the run would end for it.
    """
    shown = [job for job in jobs if (job.item.video or job.item.images) and _num_shown(job)]
    missing: list[tuple[Job, Exception]] = []
    for job in tqdm(shown, "looking for media", unit="question", delay=2.0, leave=False):
        try:
            media_of(job.item, root)
        except (DataError, OSError) as problem:
            missing.append((job, problem))
    if not missing:
        return
    first = str(missing[0][1])
    moved = root is None and bool(missing[0][0].item.root)
    remedy = ". Where the data moved, add media_root=FOLDER" if moved else ""
    if len(missing) == len(shown):
        raise DataError(
            f"no media for any of {number_of(len(shown), 'question')}, the first: {first}{remedy}"
        )
    failing = sum(_num_shown(job) for job, _ in missing)
    what = f"{len(missing)} of {number_of(len(shown), 'question')} have no media, the first: {first}"
    if failing > max_failures:
        raise DataError(
            f"{what}{remedy}. That is {number_of(failing, 'answer')} that would fail, and max_failures is "
            f"{max_failures}: mend it, or go on with max_failures={failing} or more"
        )
    announce(f"{what}; they count as failed{remedy}")


def _num_shown(job: Job) -> int:
    """Its answers that are given to the picture."""
    return sum(key.control != "text" for key in job.keys)
