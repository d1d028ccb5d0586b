"""keytoken evaluate on a real engine: killed and resumed as if nothing had been, and scored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from keytoken.cli import main
from keytoken.data.contract import SamplingContract
from keytoken.demo.batches import Encoder, clip_example
from keytoken.demo.model import TOKENS_PER_SECOND
from keytoken.demo.prepare import DemoConfig, prepare
from keytoken.demo.rows import split_question
from keytoken.demo.sampling import MAX_NEW_TOKENS, sample_answers
from keytoken.demo.warm_start import WarmStartConfig
from keytoken.evaluation.store import FILE_NAME
from keytoken.rewards.score import compute_score
from keytoken.verl_adapter.shims.hooks import on_cpu

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not on_cpu(), reason="starts the CPU engine"),
]

PROMPTS, CONTROLS, SAMPLES = 12, ("none", "blank"), 4
TOTAL = PROMPTS * len(CONTROLS) * (1 + SAMPLES)
LIMIT_S = 600


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world whose model answers in about the right form."""
    torch.set_num_threads(1)
    warm_start = WarmStartConfig(text_steps=20, clip_steps=40, relabel_steps=5)
    config = DemoConfig(num_train=14, num_heldout=PROMPTS + 2, warm_start=warm_start)
    return prepare(config, root=tmp_path_factory.mktemp("world")).root


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "keytoken.cli", *words]


def evaluate(world: Path, out: Path, **changes: Any) -> list[str]:
    options = {
        "benchmark": "demo",
        "model": world / "model",
        "limit": PROMPTS,
        "control": ",".join(CONTROLS),
        "decoding": "greedy,sampled",
        "samples": SAMPLES,
        "out": out,
        **changes,
    }
    return command("evaluate", *(f"{key}={value}" for key, value in options.items()))


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def kill_after(words: list[str], path: Path, lines: int) -> list[psutil.Process]:
    """SIGKILL the command, and only it, once its file has that many lines; returns what it had started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = path.parent.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
    limit = time.monotonic() + LIMIT_S
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"ended before it had {lines} lines:\n{log.read_text()[-3000:]}", pytrace=False)
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    return family


def answers(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return sorted(lines)


def transformers_answers(folder: Path, count: int = PROMPTS) -> dict[str, str]:
    """Greedy answers by plain transformers, without an engine, from the clips as they were drawn."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = Encoder(processor, TOKENS_PER_SECOND)
    drawn = [split_question("heldout", index, 0) for index in range(count)]
    examples = [clip_example(question, rng) for question, rng in drawn]
    texts = sample_answers(model, encoder, examples, temperature=0.0)
    return {f"heldout-{index:05d}": text for index, text in enumerate(texts)}


def test_killed_evaluation_goes_on_and_is_scored(world: Path, tmp_path: Path) -> None:
    out, straight = tmp_path / "killed", tmp_path / "straight"
    path = out / FILE_NAME
    # One question at a time, so that there is something left to kill.
    family = kill_after(evaluate(world, out, concurrency=1), path, lines=25)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind by a killed evaluation: {alive}"
    kept = path.read_bytes()
    assert 25 <= kept.count(b"\n") < TOTAL + 1

    resumed = run(evaluate(world, out))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert path.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert run(evaluate(world, straight, concurrency=5)).returncode == 0
    assert answers(path) == answers(straight / FILE_NAME)
    assert len(answers(path)) == TOTAL + 1

    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row.get("decoding") == "greedy"]
    given = {row["item_id"]: row["response"] for row in rows if row["control"] == "none"}
    assert given == transformers_answers(world / "model")

    again = run(evaluate(world, out))  # nothing to ask, so no engine
    assert "are there already" in again.stdout
    other = run(evaluate(world, out, seed=1))
    assert other.returncode == 2
    assert "decoding.seed was 0 and is 1" in other.stderr
    assert other.stderr.count("\n") == 1

    # The report is that of keytoken score on the same file, and says what the controls say.
    report = (out / "report.md").read_text()
    assert "Does it still answer?" in report
    results = json.loads((out / "results.json").read_text())
    words = ("benchmark=demo", f"predictions={path}", f"questions={world / 'heldout.parquet'}")
    scored = run(command("score", *words, f"out={tmp_path / 'scores'}", "allow_missing=true"))
    assert scored.returncode == 0, scored.stderr
    by_score = json.loads((tmp_path / "scores" / "results.json").read_text())
    tables = [
        {(one["control"], one["decoding"]): one["tables"] for one in side["runs"]}
        for side in (results, by_score)
    ]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2 * len(CONTROLS)
    controls = json.loads((out / "controls.json").read_text())
    shown = PROMPTS - PROMPTS // 7  # one family in seven shows nothing
    assert {one["num_questions"] for one in controls} == {shown}


def own_questions(demo_dir: Path, folder: Path, count: int) -> Path:
    """Held-out questions as a table of one's own, prepared, in the demo's words; the last clip is lost."""
    media = folder / "media"
    media.mkdir()
    table = []
    for row in pq.read_table(demo_dir / "heldout.parquet").to_pylist()[:count]:
        clip = Path(shutil.copy(row["videos"][0]["video"], media))
        answer = row["reward_model"]["ground_truth"]
        table.append({"video": clip.name, "question": row["extra_info"]["question"], "answer": answer})
        table[-1] |= {"problem_type": "free-form", "category": row["extra_info"]["family"]}
    (media / "table.json").write_text(json.dumps(table))
    words = ["data", "prepare", "folder", f"source={media}", f"out={folder / 'data'}", "check=none"]
    assert main([*words, "style={question}", "sampling=demo", "split=heldout"]) == 0
    clip.unlink()
    return folder / "data" / "heldout.parquet"


def test_run_folder_is_a_model_for_questions_of_ones_own(
    straight: Any, launcher: Any, tmp_path: Path
) -> None:
    """Its last checkpoint is joined, sees the run's frames, and answers as transformers has it answer.

    The questions are prepared as a user prepares them, and scored as training would reward the answers.
    """
    count, out = 5, tmp_path / "scores"
    dataset = own_questions(launcher.demo_dir, tmp_path, count + 1)
    # transformers_answers stops where the answers of the warm start do
    words = {"benchmark": "own", "questions": dataset, "model": straight.folder, "limit": count + 1}
    words |= {"decoding": "greedy", "max_tokens": MAX_NEW_TOKENS}
    other = run(evaluate(launcher.demo_dir, out, **words, sampling="eval_64f"))
    assert other.returncode == 2
    assert "max_frames is 64 asked for and 8 in training" in other.stderr
    done = run(evaluate(launcher.demo_dir, out, **words))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 6 questions have no media, the first: " in done.stdout
    header, *rows = (json.loads(line) for line in (out / FILE_NAME).read_text().splitlines())
    merged = straight.checkpoint(4) / "merged"
    assert header["model"] == str(merged)
    contract = SamplingContract.read(straight.folder / "sampling_contract.json")
    assert header["sampling"] == asdict(contract) and "sampling_mismatch" not in header
    lost = [row for row in rows if row["item_id"] == f"heldout-{count:06d}"]
    assert [row["control"] for row in lost] == list(CONTROLS)
    assert all("no such file" in row["error"] for row in lost)
    rows = [row for row in rows if row not in lost]
    assert {(row["control"], row["error"]) for row in rows} == {(control, "") for control in CONTROLS}
    given = {row["item_id"]: row["response"] for row in rows if row["control"] == "none"}
    prepared = pq.read_table(dataset).to_pylist()[:count]
    answers_there = transformers_answers(merged, count).values()
    assert given == dict(
        zip((row["extra_info"]["prompt_id"] for row in prepared), answers_there, strict=True)
    )

    rewards = [
        compute_score(
            "own",
            given[row["extra_info"]["prompt_id"]],
            row["reward_model"]["ground_truth"],
            row["extra_info"],
        )["acc"]
        for row in prepared
    ]
    report = json.loads((out / "results.json").read_text())
    tables = next(one["tables"] for one in report["runs"] if one["control"] == "none")
    assert tables["all"][0]["score"]["value"] == pytest.approx(sum(rewards) / (count + 1))
    assert [(row["name"], row["items"], row["failed"]) for row in tables["problem type"]] == [
        ("free-form", 6, 1)
    ]
    assert len(tables["category"]) == count + 1
