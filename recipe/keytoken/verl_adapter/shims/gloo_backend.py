"""S2: the process-group backend string on CPU.

Breaks: ``f"cpu:gloo,{device}:{backend}"`` becomes "cpu:gloo,cpu:gloo"; torch refuses a device twice.
Where: verl 0.9.1, utils/distributed.py:63 and :89.
Bound: verl==0.9.1.
Does: passes the backend "cpu:gloo" to the Ray entry point, the only one the V1 trainers use.
"""

import functools
from typing import Any


def apply(distributed: Any) -> None:
    """Give ``initialize_global_process_group_ray`` a default backend that exists once."""
    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> Any:
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize
