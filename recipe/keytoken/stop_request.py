"""A request to a running job to end after its step: a file in its run folder, which all its nodes see.

Whoever wants the run to stop makes the file; the trainer looks for it once a step. The file that a signal
makes says so, so that the run can tell why it ended.
"""

from pathlib import Path

STOP_FILE = "stop"


def request_stop(run_dir: str | Path, by: str) -> None:
    """Ask the run of a folder to end after the step that it is in.

    Args:
        run_dir: The run folder.
        by: What asks, such as ``SIGTERM``.
    """
    fresh = Path(run_dir) / f".{STOP_FILE}"
    fresh.write_text(by)
    fresh.replace(fresh.with_name(STOP_FILE))  # at no moment a file without its reason


def stop_requested(run_dir: str | Path) -> bool:
    """Whether somebody did."""
    return (Path(run_dir) / STOP_FILE).exists()


def who_asked(run_dir: str | Path) -> str:
    """What asked for the end; the file itself if it does not say, as when somebody made it by hand."""
    file = Path(run_dir) / STOP_FILE
    return file.read_text(errors="replace").strip().partition("\n")[0][:100] or f"The file {file}"


def withdraw_stop(run_dir: str | Path) -> None:
    """Forget a request, for the next run that goes on from there."""
    (Path(run_dir) / STOP_FILE).unlink(missing_ok=True)
