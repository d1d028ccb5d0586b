"""The command line: ``keytoken <command> ...``.

Heavy modules are imported by the command that needs them, so that ``--help`` and the checks are quick.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keytoken.data.cli import add_data
from keytoken.doctor.cli import add_doctor
from keytoken.errors import DataError, KeyTokenError
from keytoken.evaluation.cli import add_evaluate
from keytoken.lens.cli import add_lens
from keytoken.parser import Parser
from keytoken.plan.cli import add_plan
from keytoken.scoring.cli import add_lmms_export, add_score
from keytoken.submit.cli import add_submit

# What a shell reports of a program that ends because nobody reads its output.
CLOSED_PIPE = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's error is one message, not a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return CLOSED_PIPE
    except KeyTokenError as problem:
        # An error raised on a worker comes back wrapped by Ray; its message would be a remote traceback.
        problem = getattr(problem, "cause", problem)
        print(f"keytoken: {problem}", file=sys.stderr)
        return problem.exit_code


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe without a reader (``| head``); then what is left goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:  # what is still buffered would fail once more at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="keytoken", description="Token-attribution reinforcement learning for video and vision LLMs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run a training job",
        description="Run a training job. Overrides are hydra's: experiment=demo_cpu method=grpo "
        "trainer.total_training_steps=5; every key of verl and of the keytoken block can be set.",
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    train.set_defaults(run=_train)
    demo = commands.add_parser(
        "demo",
        help="train a tiny video model on rendered clips, on this machine, and compare before and after",
        description="Prepare the demo world (cached), train Video-KTR on it with the real stack and print "
        "the held-out accuracies before and after. Overrides apply on top of experiment=demo_cpu, or "
        "demo_qwen3_vl with --family qwen3_vl.",
    )
    demo.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    demo.add_argument("--prepare-only", action="store_true", help="stop after the demo world is prepared")
    demo.add_argument(
        "--family", choices=("qwen2_5_vl", "qwen3_vl"), default="qwen2_5_vl", help="of the model"
    )
    demo.set_defaults(run=_demo)
    bench = commands.add_parser(
        "bench",
        help="measure what attribution costs: the demo beside stock GRPO and with separate prompts",
        description="Train the demo as stock GRPO, as GRPO and as Video-KTR with separate and with shared "
        "prompts, and print and draw where the time of a step goes. Overrides apply to all runs.",
    )
    bench.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    bench.add_argument("--steps", type=int, default=6, help="training steps of each run (default: 6)")
    bench.set_defaults(run=_bench)
    _add_sweep(commands)
    add_submit(commands, say=print)
    add_plan(commands, say=print)
    add_doctor(commands, say=print)
    add_data(commands, say=print)
    add_evaluate(commands, say=print)
    add_score(commands, say=print)
    add_lmms_export(commands, say=print)
    add_lens(commands, say=print)
    explain = commands.add_parser(
        "explain",
        help="say in words and numbers what a method does",
        description="Print a method as a run would have it: formula and source, passes, signals, selection, "
        "loss, and how well each value is known. Overrides are those of train; without an experiment that "
        "of the demo is taken.",
    )
    explain.add_argument("overrides", nargs="*", metavar="method=NAME KEY=VALUE")
    explain.set_defaults(run=_explain)
    golden = commands.add_parser("golden", help="compare method=video_ktr_official with published outputs")
    golden.add_argument("file", help="a JSON file of golden cases")
    golden.set_defaults(run=_golden)
    return parser


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run a study: methods by seeds on variants of the demo world, with a report",
        description="Run what a study (configs/keytoken_configs/study/NAME.yaml) lacks and write its report: "
        "held-out accuracies with intervals, paired tests, curves, costs. Each run is one process in plain "
        "torch around the pure core (views, methods, losses, rewards): no Ray, vLLM or verl. An arm is "
        "composed and validated as `keytoken train experiment=demo_cpu` would. Interrupt it whenever you "
        "like: finished runs are kept, and the same command goes on with the others. KEY=VALUE changes the "
        "study's own keys, such as steps=10 or sections.clean.seeds=[1,2]; backend=stack runs every arm by "
        "`keytoken train` instead, which takes minutes a run on two cores.",
    )
    sweep.add_argument("overrides", nargs="+", metavar="study=NAME|KEY=VALUE")
    sweep.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (default: one for each core)"
    )
    sweep.add_argument(
        "--report", action="store_true", help="run nothing; write the report from what is there"
    )
    sweep.set_defaults(run=_sweep)


def _train(arguments: argparse.Namespace) -> int:
    from keytoken.main import train

    run_dir = train(arguments.overrides)
    print(f"Finished. Everything the run left behind lies in {run_dir}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from keytoken.demo.run import EXPERIMENTS, prepare_for_training
    from keytoken.evaluation.before_after import report
    from keytoken.main import train

    prepare_for_training(arguments.family)
    if not arguments.prepare_only:
        run_dir = train([f"experiment={EXPERIMENTS[arguments.family]}", *arguments.overrides])
        print(report(run_dir))
        _name_lens(run_dir)
    return 0


def _name_lens(run_dir: Path) -> None:
    """The last line of the demo: where to see the tokens, or why there is nothing to see."""
    from keytoken.lens.write import write_lens

    try:
        page = write_lens(run_dir, say=print)
    except DataError as problem:  # such as an export that was switched off: the run itself is fine
        print(f"No token lens: {problem}")
    else:
        print(f"Token lens (open it in a browser): {page}")


def _bench(arguments: argparse.Namespace) -> int:
    from keytoken.bench.run import bench

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the way that stops the run in progress
    print(bench(arguments.overrides, arguments.steps, announce=print))
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from keytoken.study.sweep import sweep

    path = sweep(arguments.overrides, jobs=arguments.jobs, report_only=arguments.report, announce=print)
    print(f"Report: {path}")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from keytoken.explain import explain

    explain(arguments.overrides)
    return 0


def _golden(arguments: argparse.Namespace) -> int:
    from keytoken.golden import main as golden

    return golden([arguments.file])


if __name__ == "__main__":
    sys.exit(main())
