"""A request to a running job to end after its step: a file in its run folder, which all its nodes see.

Whoever wants the run to stop makes the file; the trainer looks for it once a step.
"""

from pathlib import Path

STOP_FILE = "stop"


def request_stop(run_dir: str | Path) -> None:
    """Ask the run of a folder to end after the step that it is in."""
    (Path(run_dir) / STOP_FILE).touch()


def stop_requested(run_dir: str | Path) -> bool:
    """Whether somebody did."""
    return (Path(run_dir) / STOP_FILE).exists()


def withdraw_stop(run_dir: str | Path) -> None:
    """Forget a request, for the next run that goes on from there."""
    (Path(run_dir) / STOP_FILE).unlink(missing_ok=True)
