"""Which implementation runs, and what is said when it cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from keytoken_kernels import dispatch
from keytoken_kernels.dispatch import chosen, resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh_record(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.delenv("KEYTOKEN_KERNELS", raising=False)


@pytest.fixture
def interpreter(monkeypatch):
    """Sets whether Triton interprets, without touching the environment."""
    triton = pytest.importorskip("triton")
    return lambda on: monkeypatch.setitem(triton.knobs.runtime.__dict__, "interpret", on)


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail


def test_auto_means_the_reference_on_a_cpu_even_if_the_interpreter_is_on(interpreter):
    interpreter(True)
    assert resolve("op", "auto", CPU) == "reference"


def test_auto_means_the_kernels_on_a_gpu(interpreter):
    interpreter(False)
    assert resolve("op", "auto", GPU) == "triton"


def test_kernels_on_a_cpu_need_the_interpreter(interpreter):
    interpreter(True)
    assert resolve("op", "triton", CPU) == "triton"
    interpreter(False)
    with pytest.raises(ValueError, match=r"op: impl='triton' needs tensors on a GPU.*TRITON_INTERPRET=1"):
        resolve("op", "triton", CPU)
    assert chosen() == {"op": "triton"}


def test_the_interpreter_stays_in_this_process():
    """Runs that tests start are to find the environment that a user has."""
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET" not in os.environ
    program = "import triton; raise SystemExit(triton.knobs.runtime.interpret)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_missing_triton_is_an_error_and_no_fall_back(no_triton, impl):
    with pytest.raises(ImportError, match=r"op: the kernels for cuda:0 need Triton.*impl='reference'"):
        resolve("op", impl, GPU)
    assert chosen() == {}


def test_the_reference_needs_no_triton(no_triton):
    assert resolve("op", "auto", CPU) == "reference"
    assert resolve("op", "reference", GPU) == "reference"


def test_the_environment_replaces_auto_only(monkeypatch, interpreter):
    interpreter(True)
    monkeypatch.setenv("KEYTOKEN_KERNELS", "reference")
    assert resolve("op", "auto", GPU) == "reference"
    assert resolve("op", "triton", GPU) == "triton"
    monkeypatch.setenv("KEYTOKEN_KERNELS", "triton")
    assert resolve("op", "auto", CPU) == "triton"
    assert resolve("op", "reference", CPU) == "reference"
    monkeypatch.setenv("KEYTOKEN_KERNELS", "auto")
    assert resolve("op", "auto", CPU) == "reference"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference; got 'cuda'"):
        resolve("op", "cuda", CPU)
    monkeypatch.setenv("KEYTOKEN_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"KEYTOKEN_KERNELS must be one of .*; got 'fast'"):
        resolve("op", "auto", CPU)


def test_the_choice_is_logged_once_and_recorded(caplog, interpreter):
    interpreter(True)
    with caplog.at_level(logging.INFO, logger="keytoken_kernels"):
        for _ in range(3):
            resolve("first", "auto", CPU)
            resolve("second", "triton", CPU)
    assert caplog.messages == ["first: reference", "second: triton"]
    assert chosen() == {"first": "reference", "second": "triton"}
