import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from keytoken.demo import prepare as module
from keytoken.demo.prepare import DemoConfig, cache_root, prepare
from keytoken.demo.warm_start import WarmStartConfig

TINY = DemoConfig(
    num_train=7,
    num_heldout=7,
    warm_start=WarmStartConfig(text_steps=2, clip_steps=2, relabel_steps=1, batch_size=4),
)


def test_prepared_once_found_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTOKEN_CACHE", str(tmp_path))
    assets = prepare(TINY)
    assert assets.root == tmp_path / f"demo-{TINY.digest()}"
    assert set(assets.manifest["greedy"]) >= {"all", "format", "motion", "text"}
    processor = AutoProcessor.from_pretrained(assets.model_dir, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(assets.model_dir, local_files_only=True)
    assert model.config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert not list(tmp_path.rglob("*.partial"))

    def refuse(*_: object) -> None:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(module, "_prepare_model", refuse)
    assert prepare(TINY) == assets


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_prepare_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(TINY, root=tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    clips = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    prepare(TINY, root=tmp_path)
    assert len(clips) == 12
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")} == clips


def test_a_folder_of_another_configuration_is_made_anew(tmp_path: Path) -> None:
    first = prepare(TINY, root=tmp_path)
    other = dataclasses.replace(TINY, seed=1)
    second = prepare(other, root=tmp_path)
    assert second.manifest["digest"] == other.digest() != first.manifest["digest"]
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["seed"] == 1


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYTOKEN_CACHE", str(tmp_path / "elsewhere"))
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("KEYTOKEN_CACHE")
    assert cache_root() == Path.home().resolve() / ".cache" / "keytoken"
