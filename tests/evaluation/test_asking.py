"""Asking: many questions at a time, each answer kept at once, failures counted, a dead engine an end.

The engine and the maker of prompts stand in here; the real ones answer in tests/e2e/test_evaluation.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.errors import ClipError, ClusterError, ConfigurationError, DataError
from keytoken.evaluation.asking import Asker, Asking
from keytoken.evaluation.rows import SampleKey, plan, sample_seed
from keytoken.evaluation.store import PredictionStore
from keytoken.scoring.items import Item, Prediction
from keytoken.verl_adapter.offline import Answer
from keytoken.verl_adapter.pictures import Media, controlled
from keytoken.verl_adapter.prompts import PreparedPrompt

HEADER = {"benchmark": "demo"}
CONTROLS = ("none", "blank", "shuffled", "text")
ANSWERS = {"greedy": 1, "sampled": 2}


class Maker:
    """Reads a "clip" from the number in its file; a prompt says what it shows."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()

    def read(self, messages: list[dict[str, Any]]) -> Media:
        if isinstance(messages[0]["content"], str):
            return Media()
        path = Path(messages[0]["content"][0]["video"])
        self.reads[path.name] += 1
        if not path.read_text():
            raise ClipError(f"clip {path.name}: the file is empty")
        if path.read_text() == "badly sized":
            raise ConfigurationError("frames were resized")
        return Media(videos=[(torch.arange(8)[:, None] + int(path.read_text()), {"fps": 1})])

    def controlled(self, media: Media, control: str, seed: int, name: str) -> Media:
        if control != "blank":
            return controlled(media, control, (), seed, name)
        return Media(videos=media.videos and [(frames * 0, times) for frames, times in media.videos])

    def prepare(self, messages: list[dict[str, Any]], media: Media) -> PreparedPrompt:
        return PreparedPrompt([len(str(messages))], [1], None, media.videos, {"messages": messages}, {})


class Engine:
    """Answers with its seed and what it was shown; counts how many answers are on their way."""

    def __init__(self, dies_after: int | None = None, refuses: str = "no question") -> None:
        self.asked = 0
        self.busy = self.most_busy = 0
        self.dies_after, self.refuses = dies_after, refuses

    async def answer(self, prompt: PreparedPrompt, sampling: Mapping[str, Any], max_tokens: int) -> Answer:
        self.asked += 1
        if self.dies_after is not None and self.asked > self.dies_after:
            raise ClusterError("the vLLM engine has died")
        content = prompt.features["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text == self.refuses:
            raise DataError("vLLM: too long")
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        await asyncio.sleep(0.001 * (sampling["seed"] % 5))  # answers do not come in order
        self.busy -= 1
        shown = [frames[:, 0].tolist() for frames, _ in prompt.videos or []]
        return Answer(f"{sampling['seed']} {text} {shown} {sampling['top_k']}", 3, True)


def make_items(folder: Path, count: int) -> list[Item]:
    items = []
    for number in range(count):
        (folder / f"{number}.mp4").write_text(str(10 * number))
        video = f"{number}.mp4" if number else None  # the first question shows nothing
        fields: dict[str, Any] = {"benchmark": "demo", "answer": "A", "kind": "multiple choice"}
        items.append(Item(item_id=f"i{number}", question=f"question {number}", video=video, **fields))
    return items


def asking(folder: Path, **changes: Any) -> Asking:
    fields: dict[str, Any] = {
        "text": lambda item: item.question,
        "media_root": folder,
        "seed": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 8,
        "threads": 2,
        "concurrency": 3,
        "max_failures": 20,
    }
    return Asking(**{**fields, **changes})


def ask(
    folder: Path, items: list[Item], engine: Engine, maker: Maker | None = None, **changes: Any
) -> dict[SampleKey, Prediction]:
    """One evaluation, going on with what is in the folder."""
    with PredictionStore(folder / "out", HEADER) as store:
        jobs = plan(items, CONTROLS, ANSWERS, store.predictions)
        asker = Asker(asking(folder, **changes), maker or Maker(), engine, store, lambda _: None)  # type: ignore[arg-type]
        asyncio.run(asker.ask(jobs))
        return store.predictions


def test_everything_is_asked_once_under_its_control(tmp_path: Path) -> None:
    items, maker, engine = make_items(tmp_path, 5), Maker(), Engine()
    predictions = ask(tmp_path, items, engine, maker)
    assert len(predictions) == engine.asked == 5 * 4 * 3
    assert maker.reads == {f"{number}.mp4": 1 for number in range(1, 5)}  # once for twelve answers
    assert engine.most_busy <= 3 * 3  # three questions at a time, three answers each
    assert engine.most_busy > 3
    key = SampleKey("i2", "none", "sampled", 1)
    frames = list(range(20, 28))
    assert predictions[key].response == f"{sample_seed(4, key)} question 2 [{frames}] -1"
    blank = predictions[key._replace(control="blank")].response or ""
    assert blank.endswith(f"question 2 [{[0] * 8}] -1")
    text = predictions[key._replace(control="text")].response or ""
    assert text.endswith("question 2 [] -1")
    shuffled = predictions[key._replace(control="shuffled")].response or ""
    (shown,) = json.loads(shuffled[shuffled.index("[[") : shuffled.rindex("]") + 1])
    assert shown != frames
    assert sorted(shown) == frames
    greedy = predictions[key._replace(decoding="greedy", sample=0)].response or ""
    assert greedy.endswith(" 1")  # the likeliest token


@pytest.mark.parametrize("dies_after", [0, 1, 7, 31])
def test_dead_engine_ends_the_run_and_the_rest_is_asked_later(dies_after: int, tmp_path: Path) -> None:
    """The file of a run that was interrupted is that of one that was not, but for the order."""
    items = make_items(tmp_path, 5)
    with pytest.raises(ClusterError, match="has died"):
        ask(tmp_path, items, Engine(dies_after))
    engine = Engine()
    resumed = ask(tmp_path, items, engine)
    assert 60 - dies_after <= engine.asked <= 60
    (tmp_path / "straight").mkdir()
    straight = ask(tmp_path / "straight", make_items(tmp_path / "straight", 5), Engine(), concurrency=1)
    assert resumed == straight

    def lines(folder: Path) -> list[bytes]:
        return sorted((folder / "out" / "predictions.jsonl").read_bytes().splitlines())

    assert lines(tmp_path) == lines(tmp_path / "straight")


def test_bad_clip_fails_its_answers_and_no_others(tmp_path: Path) -> None:
    items = make_items(tmp_path, 4)
    (tmp_path / "2.mp4").write_text("")
    (tmp_path / "3.mp4").unlink()
    predictions = ask(tmp_path, items, Engine())
    failed = {key: each.error for key, each in predictions.items() if each.response is None}
    # Without its video a question can be asked all the same.
    assert {(key.item_id, key.control) for key in failed} == {
        (name, control) for name in ("i2", "i3") for control in ("none", "blank", "shuffled")
    }
    assert len(failed) == 2 * 3 * 3
    assert failed[SampleKey("i2", "none", "greedy", 0)] == "ClipError: clip 2.mp4: the file is empty"
    assert "no such file" in failed[SampleKey("i3", "blank", "sampled", 1)]
    assert len(predictions) == 4 * 4 * 3


def test_refused_request_fails_alone(tmp_path: Path) -> None:
    predictions = ask(tmp_path, make_items(tmp_path, 3), Engine(refuses="question 1"))
    failed = [key for key, each in predictions.items() if each.response is None]
    assert {key.item_id for key in failed} == {"i1"}
    assert len(failed) == 12
    assert predictions[failed[0]].error == "DataError: vLLM: too long"


def test_too_many_failures_end_the_run_with_the_reasons(tmp_path: Path) -> None:
    items = make_items(tmp_path, 8)
    for number in range(1, 8):
        (tmp_path / f"{number}.mp4").write_text("")
    with pytest.raises(DataError, match=r"failed, and max_failures is 10\..*the file is empty.*retry_failed"):
        ask(tmp_path, items, Engine(), max_failures=10)
    with PredictionStore(tmp_path / "out", HEADER) as store:
        failed = sum(each.response is None for each in store.predictions.values())
    assert 10 < failed < 7 * 9  # kept, and the rest was not tried


def test_fault_of_the_settings_ends_the_run_at_once(tmp_path: Path) -> None:
    items = make_items(tmp_path, 8)
    (tmp_path / "1.mp4").write_text("badly sized")
    with pytest.raises(ConfigurationError, match="frames were resized"):
        ask(tmp_path, items, Engine())


def test_part_of_a_video_is_what_is_read_of_it(tmp_path: Path) -> None:
    (item,) = make_items(tmp_path, 2)[1:]
    fields = {name: getattr(item, name) for name in ("benchmark", "item_id", "question", "answer", "kind")}
    read: list[dict[str, Any]] = []

    class Watched(Maker):
        def read(self, messages: list[dict[str, Any]]) -> Media:
            read.append(messages[0]["content"][0])
            return super().read(messages)

    ask(tmp_path, [Item(**fields, video=item.video, span=(2.0, 4.5))], Engine(), Watched())
    path = str(tmp_path / "1.mp4")
    assert read == [{"type": "video", "video": path, "video_start": 2.0, "video_end": 4.5}]


def test_media_are_read_beside_the_event_loop(tmp_path: Path) -> None:
    threads: set[str] = set()

    class Watched(Maker):
        def read(self, messages: list[dict[str, Any]]) -> Media:
            threads.add(threading.current_thread().name)
            return super().read(messages)

    ask(tmp_path, make_items(tmp_path, 6), Engine(), Watched(), threads=2)
    assert threads <= {"media_0", "media_1"}
