"""The command ``keytoken submit``."""

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from keytoken.block import require
from keytoken.submit.request import STOP_GRACE_S
from keytoken.submit.restarts import RESTART_DELAY_S

if TYPE_CHECKING:
    from keytoken.submit.request import Request

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
GPUS_PER_NODE = 8
HEAD = "http://HEAD:8265"  # stands for the address in a command that is only printed


def add_submit(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    parser = commands.add_parser(
        "submit",
        help="run a training job on a Ray cluster, follow it, and start it again if a machine fails",
        description="Submit `keytoken train KEY=VALUE ...` to the job server of a Ray cluster and follow its "
        "log; the exit code is that of the job. The configuration is checked here first. Paths have to be "
        "absolute and shared by all nodes. Variables whose names begin with KEYTOKEN_ go along.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    parser.add_argument(
        "--address", help=f"the job server, {HEAD} (default: {' or '.join(ADDRESS_VARIABLES)})"
    )
    parser.add_argument("--id", help="name of the job (default: the experiment's name and the time)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the job; without a value, that of this environment, which is not printed here "
        "(but the cluster's dashboard shows it)",
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="use the packages of this checkout, which are sent along, not installed ones",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="submit again, up to N times, when the job fails for a reason that may pass; it goes on from "
        "the last complete checkpoint (default: 0)",
    )
    parser.add_argument(
        "--restart-delay",
        type=float,
        default=RESTART_DELAY_S,
        metavar="SECONDS",
        help="pause before that, in which Ray notices lost machines (default: %(default)g)",
    )
    parser.add_argument(
        "--stop-grace",
        type=int,
        default=STOP_GRACE_S,
        metavar="SECONDS",
        help="what a job that is stopped has to finish and save its step, before it is killed "
        "(default: %(default)d)",
    )
    parser.add_argument("--no-wait", action="store_true", help="submit and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check, print the `ray job submit` that does the same",
    )
    _add_templates(parser)
    parser.set_defaults(run=lambda arguments: _submit(arguments, say))


def _add_templates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        choices=("slurm", "rayjob"),
        help="print the same job as a script for Slurm or a RayJob for Kubernetes, and submit nothing",
    )
    parser.add_argument("--image", help="image of the containers, for --template")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help=f"GPUs of a node, for --template (default: {GPUS_PER_NODE})",
    )


def _submit(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from keytoken.submit.request import Request, source_of, variables_of

    _check_options(arguments)
    _check_template(arguments)
    config = _checked(arguments.overrides, arguments.max_restarts)
    name = arguments.id or _name_of(config.trainer.experiment_name)
    request = Request(
        tuple(arguments.overrides),
        name,
        config.keytoken.run_dir,
        *variables_of(arguments.env),
        source_of(arguments.source),
        arguments.stop_grace,
    )
    if arguments.template is not None:
        say(_filled(request, config, arguments).rstrip())
        return 0
    address = arguments.address or _address_here()
    if arguments.dry_run:
        say(request.plain_command(address or HEAD))
        return 0
    require(
        bool(address),
        f"keytoken submit: no cluster; give --address {HEAD} or set {ADDRESS_VARIABLES[0]}.",
    )
    return _run(request, str(address), arguments, say)


def _filled(request: "Request", config: DictConfig, arguments: argparse.Namespace) -> str:
    """The job for a scheduler."""
    from keytoken.submit.shape import shape_of
    from keytoken.submit.templates import TEMPLATES, Values, shared_folders

    source = ("--source", str(request.source)) if request.source else ()
    restarts = ("--max-restarts", str(arguments.max_restarts)) if arguments.max_restarts else ()
    delay = ("--restart-delay", f"{arguments.restart_delay:g}") if _delays(arguments) else ()
    values = Values(
        dataclasses.replace(request, name=arguments.id or _plain(config.trainer.experiment_name)),
        shape_of(config, arguments.gpus_per_node or GPUS_PER_NODE),
        shared_folders(config),
        arguments.image,
        arguments.max_restarts,
        (*source, *restarts, *delay, "--stop-grace", str(arguments.stop_grace)),
    )
    return TEMPLATES[arguments.template](values)


def _run(request: "Request", address: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from keytoken.submit.client import JobServer  # slow: imports Ray
    from keytoken.submit.restarts import run_to_the_end

    server = JobServer(address)
    if arguments.no_wait:
        server.submit(request)
        say(f"job {request.name}: submitted; {server.command('logs --follow', request.name)} shows it")
        return 0
    try:
        outcome = run_to_the_end(
            server, request, arguments.max_restarts, arguments.restart_delay, say, _print_as_it_is
        )
    except KeyboardInterrupt:
        return 130
    say(f"{outcome.status}: {outcome.message}" if outcome.message else outcome.status)
    return outcome.command_code()


def _check_options(arguments: argparse.Namespace) -> None:
    require(arguments.max_restarts >= 0, f"--max-restarts {arguments.max_restarts}: give at least 0.")
    require(arguments.stop_grace >= 1, f"--stop-grace {arguments.stop_grace}: give at least 1.")
    require(arguments.restart_delay >= 0.0, f"--restart-delay {arguments.restart_delay:g}: give at least 0.")
    require(
        not (arguments.no_wait and arguments.max_restarts),
        "--no-wait with --max-restarts: nobody would see the job fail; leave one of them away.",
    )
    require(
        arguments.id is None or re.fullmatch(r"[\w.-]+", arguments.id) is not None,
        f"--id {arguments.id}: use letters, digits, '_', '.' and '-'.",
    )


def _check_template(arguments: argparse.Namespace) -> None:
    """Options of the other kind would be dropped in silence."""
    given = {
        "--image": arguments.image is not None,
        "--gpus-per-node": arguments.gpus_per_node is not None,
    }
    if arguments.template is not None:
        given = {
            "--dry-run": arguments.dry_run,
            "--no-wait": arguments.no_wait,
            "--address": arguments.address is not None,
            "--restart-delay": arguments.template == "rayjob" and _delays(arguments),
        }
    option = next((name for name, present in given.items() if present), None)
    with_or_without = "without" if arguments.template is None else "with"
    kind = "" if arguments.template is None else f" {arguments.template}"
    require(option is None, f"{option} {with_or_without} --template{kind} says nothing; leave it away.")
    require(
        arguments.gpus_per_node is None or arguments.gpus_per_node >= 1,
        f"--gpus-per-node {arguments.gpus_per_node}: give at least 1.",
    )


def _delays(arguments: argparse.Namespace) -> bool:
    return bool(arguments.restart_delay != RESTART_DELAY_S)


def _checked(overrides: list[str], max_restarts: int) -> DictConfig:
    """The configuration, refused here rather than after minutes on the cluster."""
    from keytoken.compose import compose_config
    from keytoken.resources import require_absolute
    from keytoken.validate import validate_run

    config = compose_config(overrides)
    validate_run(config)
    require_absolute(config)
    require(
        not max_restarts or config.trainer.resume_mode == "auto",
        f"--max-restarts {max_restarts} with trainer.resume_mode={config.trainer.resume_mode}: each try "
        "would begin at the same place; use trainer.resume_mode=auto.",
    )
    require(
        not max_restarts or config.trainer.save_freq > 0,
        f"--max-restarts {max_restarts} with trainer.save_freq={config.trainer.save_freq}: without "
        "checkpoints every try begins at step 0; set trainer.save_freq to a number of steps.",
    )
    return config


def _address_here() -> str | None:
    return next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)


def _name_of(experiment: str) -> str:
    """An id that a job server takes and that a second submission does not repeat."""
    return _plain(experiment) + time.strftime("-%y%m%d-%H%M%S")


def _plain(experiment: str) -> str:
    return re.sub(r"[^\w.-]+", "-", experiment)


def _print_as_it_is(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
