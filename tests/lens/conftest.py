"""Exports to look at, and a real browser, driven over the WebDriver protocol with the standard library."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transfer_queue import KVBatchMeta

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.data.contract import SamplingContract
from keytoken.demo.tokenizer import DEMO_CONTRACT, build_tokenizer
from keytoken.losses.advantage import group_advantages
from keytoken.schema import ExportConfig, KeyTokenConfig, LossConfig, MethodConfig, SelectionConfig
from keytoken.verl_adapter import batch as batches
from keytoken.verl_adapter import export

LOSS = LossConfig(
    normalizer="all",
    level="response",
    mask_kl=False,
    kl_coef=0.0,
    kl_clamp="verl",
    clip_low=None,
    clip_high=None,
)
SELECTION = {"score_sign": "absolute", "scope": "response"} | {
    f"{name}_ratio": 0.2 for name in ("visual", "temporal", "entropy")
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch as training has it before the export: the texts of answers, and made-up signals."""

    signals: Signals
    keys: list[str]
    answers: list[list[int]]
    method: MethodConfig
    prompts: list[str]
    clips: list[str]
    rewards: list[float]

    def write(self, run: Path, monkeypatch: pytest.MonkeyPatch, step: int = 1, limit: int = 2000) -> Path:
        """Write its export by the code of training; returns the file."""
        tokenizer = build_tokenizer()
        rows = {key: number for number, key in enumerate(self.keys)}
        outcomes = self.signals.outcomes
        advantages = torch.tensor(self.rewards)
        if outcomes is not None:
            epsilon = self.method.advantage_epsilon
            advantages = group_advantages(outcomes.rewards, self.signals.group, epsilon)

        def read(batch: KVBatchMeta, names: Sequence[str]) -> dict[str, list[Any]]:
            chosen = [rows[key] for key in batch.keys]
            content = [{"type": "text", "text": "?"}]
            found: dict[str, list[Any]] = {
                "prompts": [torch.tensor(tokenizer(self.prompts[row])["input_ids"]) for row in chosen],
                "responses": [torch.tensor(self.answers[row], dtype=torch.int64) for row in chosen],
                "rm_scores": [torch.tensor([self.rewards[row]]) for row in chosen],
                "advantages": [advantages[row].expand(len(self.answers[row])) for row in chosen],
                "raw_prompt": [
                    [{"role": "user", "content": [{"type": "video", "video": self.clips[row]}, *content]}]
                    for row in chosen
                ],
                "extra_fields": [
                    {"reward_extra_info": {"acc": float(self.rewards[row] > 1)}} for row in chosen
                ],
            }
            return {name: found[name] for name in names}

        monkeypatch.setattr(batches, "read", read)
        keytoken = KeyTokenConfig(
            method=self.method, export=ExportConfig(every_steps=1, max_responses=limit), run_dir=str(run)
        )
        trainer = SimpleNamespace(
            keytoken=keytoken, global_steps=step, tokenizer=tokenizer, contract=self.contract
        )
        batch = KVBatchMeta(partition_id="train", keys=self.keys, tags=[{}] * len(self.keys))
        written = export.maybe_write(
            trainer, batch, self.signals, compute_token_weights(self.signals, self.method)
        )
        assert written is not None
        return written

    @property
    def contract(self) -> SamplingContract:
        return DEMO_CONTRACT


def make_batch(
    texts: Sequence[str],
    *,
    per_prompt: int = 4,
    seed: int = 0,
    grain: float | None = None,
    clip: str = "/no/such/clip.mp4",
    prompt: str = "what color is it ? A red B blue",
    **selection: Any,
) -> Batch:
    """Answers with random signals.

    Args:
        texts: One for each answer.
        per_prompt: Answers to each prompt.
        seed: Of the signals.
        grain: Log-probs are multiples of this, so that scores tie; None for no ties.
        clip: The clip of every prompt.
        prompt: The question; prompts differ by a number.
        selection: Changes of the method's selection.
    """
    tokenizer = build_tokenizer()
    answers = [tokenizer(text)["input_ids"] if text else [] for text in texts]
    width = max(1, *map(len, answers))
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        values = -torch.rand(len(texts), width, generator=generator) * 4
        return values if grain is None else (values / grain).round() * grain

    lengths = torch.tensor([len(ids) for ids in answers])
    group = torch.arange(len(texts)) // per_prompt
    with_clip = group % 5 != 4
    signals = Signals(
        logp=noise(),
        logp_masked=noise(),
        logp_shuffled=noise(),
        entropy=-noise(),
        mask=torch.arange(width) < lengths[:, None],
        group=group,
        has_visual=with_clip,
        has_temporal=with_clip & (group % 3 != 2),
        row_keys=torch.randperm(len(texts), generator=generator),
        seed=2**40 + 12345 + seed,
    )
    return Batch(
        signals=signals,
        keys=[f"p{int(number):04d}_{row % per_prompt}_0" for row, number in enumerate(group)],
        answers=answers,
        method=MethodConfig(
            name="video_ktr", selection=SelectionConfig(**(SELECTION | selection)), loss=LOSS
        ),
        prompts=[f"{prompt} {int(number)}" for number in group],
        clips=[clip] * len(texts),
        rewards=[float(2 - row % 2) for row in range(len(texts))],
    )


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """:func:`make_batch`."""
    return make_batch


ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element


class Browser:
    """One window of headless Chromium."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1600,1000",
            "--force-device-scale-factor=1",
            f"--user-data-dir={profile}",
        ]
        options = {
            "binary": shutil.which("chromium"),
            "args": arguments,
            "prefs": {},
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"
        self._call("POST", f"{self._session}/timeouts", {"script": 110_000})

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"})
        request.method = method
        try:
            with urllib.request.urlopen(request, timeout=330) as reply:  # a page has 300 s
                return json.load(reply)["value"]
        except urllib.error.HTTPError as problem:
            raise AssertionError(problem.read().decode()[:2000]) from problem

    def open(self, page: Path) -> None:
        """Open a file and wait until the page says that it is ready."""
        self.messages(), self.requests()
        self._call("POST", f"{self._session}/url", {"url": page.as_uri()})
        limit = time.monotonic() + 60
        while self.run("return document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < limit, f"the page did not become ready: {self.messages()}"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script; what it returns."""
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", content)

    def wait(self, script: str, *arguments: Any) -> Any:
        """Run a script that calls its last argument when it is done."""
        content = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/async", content)

    def find(self, selector: str) -> str:
        content = {"using": "css selector", "value": selector}
        return self._call("POST", f"{self._session}/element", content)[ELEMENT]

    def hover(self, selector: str) -> None:
        """Move a real pointer over an element."""
        move = {
            "type": "pointerMove",
            "duration": 0,
            "x": 0,
            "y": 0,
            "origin": {ELEMENT: self.find(selector)},
        }
        pointer = {
            "type": "pointer",
            "id": "mouse",
            "parameters": {"pointerType": "mouse"},
            "actions": [move],
        }
        self._call("POST", f"{self._session}/actions", {"actions": [pointer]})

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        downs = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call(
            "POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": downs}]}
        )

    def resize(self, width: int, height: int) -> None:
        self._call("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def screenshot(self, target: Path) -> Path:
        target.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))
        return target

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", f"{self._session}/se/log", {"type": kind})

    def messages(self) -> list[str]:
        """What the page wrote to its console since the last call, errors and refusals among it."""
        return [entry["message"] for entry in self.log("browser")]

    def requests(self) -> list[str]:
        """Addresses of a network asked for since the last call, but for those that the policy stopped."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        failed = [event["params"] for event in events if event["method"] == "Network.loadingFailed"]
        stopped = {params["requestId"] for params in failed if params.get("blockedReason") == "csp"}
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent if params["requestId"] not in stopped]
        return [url for url in urls if url.startswith(("http", "ws", "ftp"))]

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of a session; skips where none is installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here (apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _until_open(port, driver)
        made = Browser(port, tmp_path_factory.mktemp("profile"))
        yield made
        made.close()
    finally:
        driver.terminate()
        driver.wait(30)


def _until_open(port: int, driver: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 60
    while True:
        assert driver.poll() is None and time.monotonic() < limit, "chromedriver did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
