"""The benchmarks by name.

Add one: a module with the reader, the prompt and the rule, which ends in ``BENCHMARK = Benchmark(...)`` and
says in its docstring which official script was read; one line below; and tests against worked examples.
"""

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError
from keytoken.scoring.benchmarks import (
    demo,
    mmvu,
    mvbench,
    own,
    tempcompass,
    video_holmes,
    videomme,
    videommmu,
    vsibench,
)
from keytoken.scoring.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        video_holmes,
        videommmu,
        mmvu,
        tempcompass,
        videomme,
        mvbench,
        vsibench,
        own,
        demo,
    )
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ConfigurationError: If there is none; the message lists those that exist and the closest name.
    """
    if name not in BENCHMARKS:
        raise ConfigurationError(unknown_name(f"benchmark {name!r}", name, BENCHMARKS, "benchmarks"))
    return BENCHMARKS[name]
