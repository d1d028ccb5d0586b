"""N1: a log call that raises.

Breaks: ``logger.info(..., flush=True)`` raises TypeError when ``actor_rollout_ref.hybrid_engine=False``
and the logger is enabled for INFO (its default).
Where: verl 0.9.1, trainer/ppo/v1/trainer_separate_async.py:181-185, at the end of ``_setup``.
Bound: verl==0.9.1.
Does: raises that one logger's level while ``_setup`` runs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = "verl.trainer.ppo.v1.trainer_separate_async"


@contextmanager
def quiet_separate_async_logger() -> Iterator[None]:
    """Log warnings only from verl's separate_async trainer inside the block."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
