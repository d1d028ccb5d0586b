"""The run's configuration: composed and checked as ``keytoken train`` does, then by verl's own rules."""

import contextlib
import io
import warnings

from keytoken.doctor.finding import Finding, Subject, of_error, ok, skip
from keytoken.errors import ConfigurationError
from keytoken.resources import num_slots, validate_files


def configuration(subject: Subject) -> Finding:
    """What composing and KeyToken's rules said."""
    if subject.problem is not None:
        return of_error(subject.problem)
    config = subject.run
    answers = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    return ok(
        f"method {config.keytoken.method.name}, {config.data.train_batch_size} prompts x "
        f"{config.actor_rollout_ref.rollout.n} = {answers} answers a step, {num_slots(config)} "
        f"{'slots' if subject.cpu else 'GPUs'}"
    )


def files(subject: Subject) -> Finding:
    """The files that the configuration names exist."""
    if not subject.here:
        return skip("the run joins a cluster, whose nodes have other files")
    try:
        validate_files(subject.run)
    except ConfigurationError as problem:
        return of_error(problem)
    return ok("the data files and the model are there")


def verl_rules(subject: Subject) -> Finding:
    """verl's own checks; importing verl takes a while."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # engines that verl could have used but for a missing package
        from keytoken.verl_adapter.task_runner import check_by_verl

        try:
            check_by_verl(subject.run)  # it prints when it is content
        except ConfigurationError as problem:
            return of_error(problem)
    return ok("verl accepts the configuration")
