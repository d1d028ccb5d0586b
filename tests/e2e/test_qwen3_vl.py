"""Qwen3-VL on the real stack: the engine against plain transformers, and two steps on three pools."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SABOTAGE = str(Path(__file__).with_name("sabotage.py"))
REFERENCE = Path(__file__).parents[1] / "workers" / "reference.py"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WARM_START = {"text_steps": 20, "clip_steps": 40, "relabel_steps": 5}
PIXELS, GRIDS = ("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world whose Qwen3-VL has seen a few supervised steps: enough to answer, not to answer well."""
    from keytoken.demo.prepare import DemoConfig, prepare
    from keytoken.demo.validation import write_validation
    from keytoken.demo.warm_start import WarmStartConfig

    torch.set_num_threads(1)
    warm_start = WarmStartConfig(**WARM_START)
    config = DemoConfig(num_train=28, num_heldout=7, family="qwen3_vl", warm_start=warm_start)
    assets = prepare(config, root=tmp_path_factory.mktemp("qwen3_world"))
    write_validation(assets.heldout_file, assets.root / "validation.parquet")
    return assets.root


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the engine made of a prompt: its ids, an answer, and the answer's log-probs."""

    prompt_ids: list[int]
    answer: list[int]
    log_probs: torch.Tensor


@pytest.fixture(scope="module")
def prompts(world: Path) -> dict[str, Any]:
    """Prompts as training and evaluation make them."""
    from keytoken.demo.tokenizer import QWEN3_CONTRACT
    from keytoken.verl_adapter.offline import PromptMaker

    maker = PromptMaker(world / "model", {"sampling_contract": dataclasses.asdict(QWEN3_CONTRACT)})
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    clips = sorted(str(path) for path in (world / "clips" / "train").glob("*-order.mp4"))[:2]
    picture = {"type": "image", "image": Image.fromarray(noise[0])}
    shown = {
        "video": [{"type": "video", "video": clips[0]}],
        "videos": [{"type": "text", "text": "first "}, *({"type": "video", "video": clip} for clip in clips)],
        "image": [picture],
        "image and video": [picture, {"type": "video", "video": clips[0]}],
        "text": [],
    }
    made: dict[str, Any] = {"maker": maker}
    for name, content in shown.items():
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "which comes first ?"}]}]
        made[name] = maker.prepare(messages, maker.read(messages))
    return made


@pytest.fixture(scope="module")
def asked(world: Path, prompts: dict[str, Any]) -> dict[str, Asked]:
    """Answers of one engine, also to the video's prompt in the form that verl sends (B7)."""
    from keytoken.compose import compose_config
    from keytoken.verl_adapter.compat import one_placeholder_for_each_picture
    from keytoken.verl_adapter.offline import OfflineEngine

    maker = prompts["maker"]
    wanted = {name: prompt for name, prompt in prompts.items() if name != "maker"}
    as_verl = one_placeholder_for_each_picture(wanted["video"].token_ids, maker.processor)
    wanted["B7"] = dataclasses.replace(wanted["video"], engine_ids=as_verl)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYTOKEN_DEMO_DIR", str(world))
        # As in a run: for log-probs vLLM's processes would want a C++ compiler.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        config = compose_config(["experiment=demo_qwen3_vl"])
        engine = OfflineEngine(world / "model", config.actor_rollout_ref.rollout, maker, 512)
        try:
            return asyncio.run(_answers(engine, wanted))
        finally:
            engine.shutdown()


async def _answers(engine: Any, wanted: dict[str, Any]) -> dict[str, Asked]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)
    found = {}
    for name, prompt in wanted.items():
        async for output in engine._engine.generate(engine._request(prompt), sampling, name):
            last = output
        ids, given = list(last.outputs[0].token_ids), last.outputs[0].logprobs
        log_probs = torch.tensor([entry[token].logprob for entry, token in zip(given, ids, strict=True)])
        found[name] = Asked(list(last.prompt_token_ids), ids, log_probs)
    return found


@pytest.fixture(scope="module")
def expected(
    world: Path, prompts: dict[str, Any], asked: dict[str, Asked], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The answers' log-probs by plain transformers, from the trainer's ids, positions and pixels.

    "B8": of the video in pixels that are normalised as the released Qwen2.5-VL does it.
    """
    from keytoken.data.families import positions_of

    folder, cases, answers = tmp_path_factory.mktemp("reference"), {}, {}
    for name, prompt in prompts.items():
        if name == "maker":
            continue
        answers[name] = asked[name].answer
        ids = [*prompt.token_ids, *answers[name]]
        shown = {key: prompt.features[key] for key in (*PIXELS, *GRIDS) if key in prompt.features}
        cases[name] = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "position_ids": positions_of(prompts["maker"].processor, ids, prompt.features),
            "response_length": len(answers[name]),
            **shown,
        }
    answers["B8"] = answers["video"]
    cases["B8"] = {**cases["video"], PIXELS[1]: normalised_otherwise(cases["video"][PIXELS[1]])}
    torch.save(list(cases.values()), folder / "cases.pt")
    command = [sys.executable, REFERENCE, world / "model", folder / "cases.pt", folder / "logits.pt"]
    subprocess.run(command, check=True, timeout=300)
    logits = dict(zip(cases, torch.load(folder / "logits.pt"), strict=True))
    return {
        name: rows.double().log_softmax(-1).gather(1, torch.tensor(answers[name])[:, None])[:, 0]
        for name, rows in logits.items()
    }


def normalised_otherwise(pixels: torch.Tensor) -> torch.Tensor:
    """Patches [N, D] with a mean and a deviation of 0.5, with those of another processor."""
    mean, std = (
        torch.tensor(value).repeat_interleave(pixels.shape[1] // 3) for value in (CLIP_MEAN, CLIP_STD)
    )
    return ((pixels * 0.5 + 0.5) - mean) / std


@pytest.mark.parametrize("name", ["video", "videos", "image", "image and video", "text"])
def test_the_engine_sees_what_the_trainer_sees(
    name: str, prompts: dict[str, Any], asked: dict[str, Asked], expected: dict[str, torch.Tensor]
) -> None:
    """Equal ids, of which every video was sent as one block, and equal log-probs in float32."""
    assert asked[name].prompt_ids == prompts[name].token_ids
    torch.testing.assert_close(asked[name].log_probs.double(), expected[name], atol=1e-4, rtol=0)


def test_b7_and_b8_show(
    prompts: dict[str, Any], asked: dict[str, Asked], expected: dict[str, torch.Tensor]
) -> None:
    """A prompt as verl sends it becomes another one; pixels normalised otherwise have other log-probs."""
    assert asked["B7"].prompt_ids != prompts["video"].token_ids
    assert (expected["B8"] - expected["video"]).abs().max() > 1e-2


def test_qwen3_vl_trains(make_launcher, world: Path, tmp_path: Path) -> None:
    """Two steps of Video-KTR: engine, actor and attribution group agree, and the views score.

    Before the first, the parity gate has named B7 and B8, brought back and mended again (``sabotage.py``).
    """
    words = ("policy=demo_qwen3_vl", "sampling=demo_qwen3_vl", "trainer.total_training_steps=2")
    variables = {
        "KEYTOKEN_SABOTAGE": str(tmp_path / "said.json"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    run = make_launcher(world).run("qwen3_vl", *words, program=(SABOTAGE,), environment=variables)
    said = json.loads((tmp_path / "said.json").read_text())
    assert said.keys() == {"B7", "B8", "nothing"} and said["nothing"] is None
    row = "of row 0 of the training data [prompt train-00000"
    assert f"ids {row}" in said["B7"] and f"pixels {row}" in said["B8"]
    steps = run.metrics()
    assert len(steps) == 2
    for step in steps:
        assert step["attribution/base_gap_max"] <= 1e-5
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert 0.2 <= step["attribution/selected_share"] < 0.9
        assert step["actor/grad_norm"] > 0
    tokens = pd.concat([run.tokens(step) for step in (1, 2)])
    text = tokens["prompt"].str.contains("plus")
    assert text.any() and not text.all()
    assert all("<0.2 seconds>" in prompt for prompt in tokens[~text]["prompt"])
    for score in ("visual", "temporal"):
        assert max(np.abs(row).max() for row in tokens[text][score]) == 0.0
        assert max(np.abs(row).max() for row in tokens[~text][score]) > 1e-3
