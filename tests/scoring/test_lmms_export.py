"""The exported task folder, read the way lmms-eval reads one. These tests do not run lmms-eval itself."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from keytoken.cli import main
from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.lmms_export import ExportOptions, export
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.score import align, score_predictions, tables

# Fields of TaskConfig in lmms-eval 0.7.3, api/task.py, as far as a task without few-shot examples needs them.
TASK_KEYS = {
    *("task", "task_alias", "tag", "group", "dataset_path", "dataset_name", "dataset_kwargs", "test_split"),
    *("validation_split", "process_docs", "doc_to_visual", "doc_to_text", "doc_to_target", "doc_to_messages"),
    *("process_results", "metric_list", "output_type", "generation_kwargs", "repeats", "filter_list"),
    *("cluster_key", "score_key", "metadata", "lmms_eval_specific_kwargs", "reasoning_tags"),
}
FUNCTIONS = {"doc_to_visual", "doc_to_text", "process_results"}


def questions(folder: Path) -> Path:
    kinds = ["object_counting", "object_counting", "route_planning", "object_rel_direction_easy"]
    rows = [
        {
            "id": number,
            "dataset": "scannet",
            "scene_name": f"scene{number}",
            "question_type": kind,
            "question": f"Question {number}\u2028?",
            "ground_truth": "4" if kind == "object_counting" else "B",
            "options": None if kind == "object_counting" else ["A. chair", "B. table"],
        }
        for number, kind in enumerate(kinds)
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def exported(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]], ModuleType, Path]:
    """The task's configuration, its documents, its utils and the question file."""
    path, out = questions(tmp_path), tmp_path / "it's a task"
    given = {"benchmark": "vsibench", "questions": (str(path),), "media_root": str(tmp_path), "out": str(out)}
    said: list[str] = []
    assert export(ExportOptions(**given | changes), said.append) == 0
    assert str(out) in said[1]
    spec = importlib.util.spec_from_file_location("utils", out / "utils.py")
    assert spec is not None and spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    class Loader(yaml.FullLoader):
        pass

    def function(loader: yaml.FullLoader, node: yaml.ScalarNode) -> Any:
        module, name = str(loader.construct_scalar(node)).split(".")
        assert module == "utils"
        return getattr(utils, name)

    Loader.add_constructor("!function", function)
    config = yaml.load((out / "keytoken_vsibench.yaml").read_text(encoding="utf-8"), Loader)
    with Path(config["dataset_kwargs"]["data_files"]["test"]).open(encoding="utf-8") as lines:
        return config, [json.loads(line) for line in lines], utils, path


def test_the_configuration_has_the_keys_that_lmms_eval_reads(tmp_path: Path) -> None:
    config, docs, _, _ = exported(tmp_path)
    assert set(config) <= TASK_KEYS
    assert config["task"] == "keytoken_vsibench"
    assert (config["dataset_path"], config["test_split"]) == ("json", "test")
    assert all(callable(config[name]) for name in FUNCTIONS)
    assert config["doc_to_target"] in docs[0]
    assert config["generation_kwargs"]["until"] == []  # else lmms-eval cuts answers at the first empty line
    for metric in config["metric_list"]:
        assert callable(metric["aggregation"])
        assert isinstance(metric["higher_is_better"], bool)


def test_documents_have_our_prompts_and_all_the_same_fields(tmp_path: Path) -> None:
    config, docs, _, path = exported(tmp_path)
    items = get_benchmark("vsibench").read([path])
    assert [config["doc_to_text"](doc) for doc in docs] == [
        get_benchmark("vsibench").prompt(one) for one in items
    ]
    assert len({tuple(doc) for doc in docs}) == 1
    assert all(value is None or isinstance(value, str) for doc in docs for value in doc.values())
    _, tagged, _, _ = exported(tmp_path, style="reasoning", overwrite=True)
    assert "<think>" in tagged[0]["prompt"]
    assert "A. chair" in tagged[2]["prompt"]


def test_scores_there_are_our_scores_and_logs_are_read_back(tmp_path: Path) -> None:
    """lmms-eval's loop by hand: process every document, aggregate, write the log, score the log."""
    config, docs, _, path = exported(tmp_path)
    responses = ["4", "3", "A. chair", "<think>B or A</think><answer>B</answer>"]
    results = [
        config["process_results"](doc, [response]) for doc, response in zip(docs, responses, strict=True)
    ]
    aggregated = {
        metric["metric"]: metric["aggregation"]([result[metric["metric"]] for result in results])
        for metric in config["metric_list"]
    }
    by_hand = ((1.0 + 0.6) / 2 + 0.0 + 1.0) / 3
    assert aggregated["keytoken_score"] == pytest.approx(by_hand, abs=1e-12)
    assert aggregated["keytoken_undecided"] == 0.0
    log = tmp_path / "20250101_samples_keytoken_vsibench.jsonl"
    lines = [
        {"doc_id": number, "target": doc["answer"], "filtered_resps": [response], "input": doc["prompt"]}
        | result
        for number, (doc, response, result) in enumerate(zip(docs, responses, results, strict=True))
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    benchmark = get_benchmark("vsibench")
    items = benchmark.read([path])
    scores = score_predictions(benchmark, items, align(read_predictions(log, benchmark), items))[0]
    assert scores.differing == []
    row = tables(scores)[0].rows[0]
    assert row.score is not None
    assert row.score.value == pytest.approx(by_hand, abs=1e-12)


def test_undecided_answers_are_left_out_of_the_score_and_shown(tmp_path: Path) -> None:
    _, _, utils, _ = exported(tmp_path)
    results = [
        {"item_id": str(n), "score": score, "categories": {}} for n, score in enumerate([1.0, None, 0.0])
    ]
    utils.BENCHMARK = "videomme"
    assert utils.aggregate(results) == 0.5
    assert utils.undecided(results) == pytest.approx(1 / 3)
    assert math.isnan(utils.aggregate(results[1:2]))


def test_a_video_is_looked_for_below_the_media_root(tmp_path: Path) -> None:
    config, docs, _, _ = exported(tmp_path)
    with pytest.raises(DataError, match=r"scene0\.mp4 does not exist"):
        config["doc_to_visual"](docs[0])
    (tmp_path / "scannet").mkdir()
    (tmp_path / "scannet" / "scene0.mp4").touch()
    assert config["doc_to_visual"](docs[0]) == [str(tmp_path / "scannet" / "scene0.mp4")]
    assert config["doc_to_visual"](docs[0] | {"video": None}) == []


def test_questions_about_a_part_of_a_video_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "action_sequence.json"
    row = {
        "video": "a.mp4",
        "question": "What?",
        "candidates": ["x", "y"],
        "answer": "x",
        "start": 1,
        "end": 2.5,
    }
    path.write_text(json.dumps([row]), encoding="utf-8")
    options = ExportOptions(
        benchmark="mvbench", questions=(str(path),), media_root=str(tmp_path), out=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"action_sequence/0 is about seconds 1 to 2\.5"):
        export(options, print)
    assert not (tmp_path / "out").exists()


def test_an_unknown_style_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"prompt style 'terse'.*official, reasoning, direct"):
        exported(tmp_path, style="terse")


def test_a_task_is_not_replaced_in_silence(tmp_path: Path) -> None:
    exported(tmp_path)
    before = (tmp_path / "it's a task" / "questions.jsonl").read_bytes()
    with pytest.raises(ConfigurationError, match=r"questions\.jsonl exists; .*overwrite=true"):
        exported(tmp_path, style="direct")
    assert (tmp_path / "it's a task" / "questions.jsonl").read_bytes() == before
    _, docs, _, _ = exported(tmp_path, style="direct", overwrite=True)
    assert "Reply with" in docs[0]["prompt"]


def test_the_media_root_by_either_name(tmp_path: Path) -> None:
    _, _, utils, _ = exported(tmp_path, media_root=None, media=str(tmp_path))
    assert str(tmp_path) == utils.MEDIA
    with pytest.raises(ConfigurationError, match="two names of one thing"):
        exported(tmp_path, media=str(tmp_path))
    with pytest.raises(ConfigurationError, match="media_root is missing"):
        exported(tmp_path, media_root=None, overwrite=True)


def test_the_command_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "benchmark=vsibench",
        f"questions={questions(tmp_path)}",
        f"media_root={tmp_path}",
        f"out={tmp_path}/task",
    ]
    assert main(["lmms-export", *words]) == 0
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == [
        "keytoken_vsibench.yaml",
        "questions.jsonl",
        "utils.py",
    ]
    assert "4 questions of VSI-Bench" in capsys.readouterr().out
    assert main(["lmms-export", *words[:-1]]) == 2
    assert "out is missing" in capsys.readouterr().err
