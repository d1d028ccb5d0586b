"""Numerical kernels of KeyToken. Imports nothing of the ``keytoken`` package."""
