"""Parts of the benchmark of the kernels; ``kernels/benchmarks/gpu.py`` puts them together."""
