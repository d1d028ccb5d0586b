"""The selection of a step, on the device of one worker."""

import dataclasses
import time

import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.reuse import ScoreMemory
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def select_on(
    device: torch.device,
    signals: Signals,
    method: MethodConfig,
    impl: Impl,
    memory: ScoreMemory | None = None,
) -> TokenWeights:
    """Run a method on a device.

    Args:
        device: where the method computes.
        signals: the batch, on the CPU.
        method: what to select, and how.
        impl: implementation of the kernels.
        memory: where steps without passes take their scores from; None where every step has passes.

    Returns:
        Its token weights, on the CPU, with the metric ``kernels/select_s``: seconds with both transfers.

    Raises:
        ConfigurationError: a signal is on but its pass did not run.
        NonFiniteError: a log-prob or an entropy is NaN or infinite.
    """
    start = time.perf_counter()
    # The way back waits for the device.
    here = signals.to(device)
    if memory is not None:
        here = memory.complete(here)
    result = compute_token_weights(here, method, impl).to(torch.device("cpu"))
    seconds = time.perf_counter() - start
    return dataclasses.replace(result, metrics={**result.metrics, "kernels/select_s": seconds})
