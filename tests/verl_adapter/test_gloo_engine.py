"""The gloo weight transport between real processes: bit-exact in any bucket size, and never a hang."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

PROGRAM = Path(__file__).with_name("gloo_ranks.py")
Run = Callable[..., dict[str, dict[Any, Any]]]


@pytest.fixture(scope="module")
def sent() -> Callable[[int], dict[str, torch.Tensor]]:
    """The tensors that the program sends in its n-th sync."""
    spec = importlib.util.spec_from_file_location("gloo_ranks", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return lambda sync: dict(program.weights(sync))


@pytest.fixture
def ranks(tmp_path: Path) -> Run:
    def run(bucket: int, timeout_s: float, *options: str) -> dict[str, dict[Any, Any]]:
        command = [sys.executable, "-W", "ignore", PROGRAM, tmp_path, bucket, timeout_s, *options]
        subprocess.run([str(word) for word in command], check=True, timeout=240)
        return {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}

    return run


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("bucket", [64, 1 << 20])
def test_every_receiver_gets_every_bit(
    ranks: Run, sent: Callable[[int], dict[str, torch.Tensor]], bucket: int
) -> None:
    """Buckets smaller than most tensors, and one larger than all together; two syncs with other weights."""
    results = ranks(bucket, 60.0)
    for sync in (0, 1):
        wanted = sent(sync)
        for receiver in ("receiver0", "receiver1"):
            received = results[receiver][sync]
            assert list(received) == list(wanted)
            for name, tensor in wanted.items():
                assert received[name].shape == tensor.shape
                assert received[name].dtype == tensor.dtype
                assert torch.equal(bits(received[name]), bits(tensor)), name
        size = sum(tensor.nbytes for tensor in wanted.values())
        assert results["sender"][sync] == {
            "count": len(wanted),
            "metrics": {"weight_sync/bytes": float(size)},
        }
        # A full tensor is a collective of all actor ranks: the idle one must walk the generator as well.
        assert results["idle"][sync] == {"count": len(wanted), "metrics": {}}


def test_the_ranks_meet_at_the_nodes_address_and_at_no_other() -> None:
    from keytoken.verl_adapter.gloo_engine import GlooCheckpointEngine  # slow: imports verl

    engine = GlooCheckpointEngine(64, is_master=True)
    meeting = engine.prepare()
    assert meeting is not None
    sockets = psutil.Process().net_connections("tcp")
    listening = [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == meeting.port] == [meeting.host]


def test_a_receiver_that_dies_is_an_error_and_no_hang(ranks: Run) -> None:
    results = ranks(64, 10.0, "dies")
    assert "receiver1" not in results
    assert "error" in results["sender"]
    assert results["sender"]["seconds"] < 25.0
    assert "error" in results["receiver0"]
    assert results["receiver0"]["seconds"] < 25.0
