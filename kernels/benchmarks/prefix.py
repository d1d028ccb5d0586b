"""Passes that share a prompt between the answers to it, beside passes that do not; one table in one call.

    python kernels/benchmarks/prefix.py --out results/

On a GPU: bfloat16, shapes of Qwen2.5-VL 7B with random weights, flash-attn where it is installed. Without one
a model of 9 million parameters in float32. See README.md.
"""

import sys

from prefix_bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
