"""Workarounds for verl, vLLM and torch, one file each, named after what it works around.

Every file says in its docstring what breaks, where (file and line), for which versions, and what it
does about it, and defines ``apply(module)``, which patches the freshly imported module. The table of
all shims is in :mod:`keytoken.verl_adapter.register`; each has a regression test in
``tests/verl_adapter`` which also asserts that the bug is still there, so that a shim whose reason is
gone makes its test fail and can be dropped.

This package's own ``__init__`` stays free of imports: one shim is loaded at the end of ``import torch``.
"""
