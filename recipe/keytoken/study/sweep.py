"""``keytoken sweep``: run what a study lacks, then write its report."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from keytoken.errors import ConfigurationError
from keytoken.study import runs, stack, warm
from keytoken.study.config import StudyConfig, load_study
from keytoken.study.report import write_report
from keytoken.study.settings import RunPlan, TrainSettings, load_settings, plans_of

Job = tuple[Path, RunPlan, TrainSettings | None]


def sweep(words: Sequence[str], *, jobs: int, report_only: bool, announce: Callable[[str], None]) -> Path:
    """Run a study, or go on with it, and write its report.

    Args:
        words: ``study=<name>`` and overrides of the study's keys.
        jobs: Runs at the same time, each on one thread in a process of its own; 1 runs them in this process.
            Runs of the real stack go one after the other whatever this says.
        report_only: Write the report from the runs that are there, even if what they were run with has
            changed since; that is announced.
        announce: Told what is going on, a line at a time.

    Returns:
        The report.

    Raises:
        ConfigurationError: the study, or what an arm composes to, cannot work; found before anything is run.
    """
    if jobs < 1:
        raise ConfigurationError(f"--jobs {jobs}: use 1 or more.")
    study = load_study(words)
    folder = folder_of(study)
    wanted = [(folder, plan, load_settings(plan)) for plan in plans_of(study)]
    missing = [job for job in wanted if not runs.is_finished(*job)]
    files = [runs.run_file(*job[:2]) for job in wanted]
    finished = (
        f"{len(wanted) - len(missing)} of them finished" if any(map(Path.exists, files)) else "none started"
    )
    announce(f"Study {study.name}: {len(wanted)} runs, {finished}.")
    announce(f"Each run is {runs.BACKENDS[study.backend]}.")

    def report() -> Path:
        return write_report(folder, study, [runs.read_run(path) for path in files if path.exists()])

    if report_only:
        older = [job[1].name for job in missing if runs.run_file(*job[:2]).exists()]
        if older:
            announce(f"{len(older)} runs are of other settings or sources than those of now: {older[0]}, ...")
    else:
        run_all(missing, jobs if study.backend == "process" else 1, report)
    return report()


def folder_of(study: StudyConfig) -> Path:
    """Where a study's runs and report go."""
    return Path(study.folder or Path("outputs", "studies", study.name)).expanduser().absolute()


def execute(folder: Path, plan: RunPlan, settings: TrainSettings | None) -> Path:
    """One run, by the backend of its plan; returns its file."""
    return stack.execute(folder, plan) if settings is None else runs.execute(folder, plan, settings)


def run_all(missing: Sequence[Job], jobs: int, after_section: Callable[[], object]) -> None:
    """Execute runs in their order, section by section, each after the warm start that it begins with."""
    torch.set_num_threads(1)
    with tqdm(total=len(missing), desc="runs", unit="run", dynamic_ncols=True) as bar:
        for section, group in itertools.groupby(missing, key=lambda job: job[1].section):
            members = list(group)
            warm.prepare(members[0][1].start)
            bar.set_postfix_str(section)
            for _ in _finished(members, jobs):
                bar.update()
            after_section()


def _finished(members: Sequence[Job], jobs: int) -> Iterator[Path]:
    """Execute runs, and tell of each as it ends."""
    if jobs == 1 or len(members) < 2:
        yield from (execute(*job) for job in members)
        return
    # Spawned, not forked: torch has started threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(members)), mp_context=spawn) as pool:
        for future in as_completed([pool.submit(execute, *job) for job in members]):
            yield future.result()
