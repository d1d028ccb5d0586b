"""Correctness and speed of the kernels in one call of less than ten minutes; the reference where no GPU is.

    python kernels/benchmarks/gpu.py --out results/               # gates, ceilings, times
    python kernels/benchmarks/gpu.py --out results/ --memcheck    # gates under compute-sanitizer

Exit code 0: measured. 1: a gate failed, and no time is printed. 2: it could not start. See README.md.
"""

import sys

from kernel_bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
