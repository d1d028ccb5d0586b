"""Cases of the selection: three signals at every scope, with advantages, beside the reference in torch."""

from __future__ import annotations

from functools import partial

from kernel_bench import inputs
from kernel_bench.cases import OURS, Case, Setting, Target
from kernel_bench.operators import Operators
from kernel_bench.sizes import NUM_SETS, Sizes
from kernel_bench.timing import Call

REFERENCE = "reference in torch"
ON_DEVICE, CALLED = f"{OURS}, on the device", f"{OURS}, called from Python"
TARGETS = {
    "sequence": (Target(provider=ON_DEVICE, at_most_us=12.0),),
    "group": (Target(provider=ON_DEVICE, at_most_us=25.0),),
    "batch": (
        Target(provider=ON_DEVICE, at_most_us=60.0),
        Target(provider=CALLED, against=REFERENCE, times=50.0),
    ),
}


def selection(sizes: Sizes, batch: int, scope: str, *, targets: bool = False) -> Case:
    """Scores, thresholds, selected tokens, weights, advantages and counts of one batch."""
    return Case(
        name=f"K2 {scope} scope, B={batch}, T={sizes.width}",
        tokens=batch * sizes.width,
        prepare=partial(_prepare, batch=batch, scope=scope),
        targets=TARGETS[scope] if targets else (),
        seconds=sizes.seconds / 2,
    )


def _prepare(setting: Setting, batch: int, scope: str) -> dict[str, Call]:
    generator = inputs.generator_of(setting.machine.device, 700 + batch)
    given = [inputs.selection_inputs(batch, setting.sizes.width, scope, generator) for _ in range(NUM_SETS)]

    def call(operators: Operators, i: int) -> object:
        each = given[i]
        return operators.select(
            each.signals, each.mask, each.segments, rewards=each.rewards, groups=each.groups
        )

    called = partial(call, setting.operators)
    if setting.machine.device.type != "cuda":
        return {OURS: called}  # which is the reference
    replays = [setting.machine.replayable(partial(called, i)) for i in range(NUM_SETS)]
    return {
        ON_DEVICE: lambda i: replays[i](),
        CALLED: called,
        REFERENCE: partial(call, Operators.of("reference")),
    }
