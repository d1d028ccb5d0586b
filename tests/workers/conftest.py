"""A tiny model, prompts of every modality, a real attribution worker, and an independent truth."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transformers import AutoConfig

from keytoken.data.families import positions_of
from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import CONTRACTS, build_processor, build_tokenizer

FPS = 3  # no whole number of seconds in a patch
OTHER_VIEWS = ("blank", "blackened", "tubelets", "reversed", "frozen")
SEEN_OTHERWISE = ("video", "same video", "two videos", "image and video")


@dataclasses.dataclass(frozen=True)
class Example:
    """One answer: what a row is made of, and what a reference pass needs.

    Attributes:
        input_ids: [L] prompt and answer.
        positions: [3, L] M-RoPE positions.
        response_length: Tokens of the answer.
        media: Pixel tensors and grids.
        uid: Prompt.
        clips: uint8 frames [T, 3, H, W] of each video, as they were given to the processor.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    response_length: int
    media: dict[str, torch.Tensor]
    uid: str
    clips: tuple[torch.Tensor, ...] = ()

    @property
    def position_ids(self) -> torch.Tensor:
        """[4, L] as verl carries them, text row first."""
        return torch.cat([torch.arange(len(self.input_ids))[None], self.positions])

    @property
    def labels(self) -> torch.Tensor:
        return self.input_ids[len(self.input_ids) - self.response_length :]


class Encoder:
    """Makes examples with the real processor."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.processor = build_processor(build_tokenizer(family), family)
        self.side = int(CONTRACTS[family].max_pixels ** 0.5)
        self.generator = torch.Generator().manual_seed(11)

    def noise(self, num_frames: int) -> torch.Tensor:
        """A clip of random frames, all different."""
        return torch.randint(
            0, 256, (num_frames, 3, self.side, self.side), dtype=torch.uint8, generator=self.generator
        )

    def answer(self, length: int) -> list[int]:
        """Random ids of ordinary tokens."""
        return torch.randint(0, 200, (length,), generator=self.generator).tolist()

    def pixels(self, clips: list[torch.Tensor]) -> torch.Tensor:
        """What the video processor makes of clips."""
        made = self.processor.video_processor(videos=clips, do_sample_frames=False, return_tensors="pt")
        return made["pixel_values_videos"]

    def example(
        self,
        uid: str,
        answer: list[int],
        clips: list[torch.Tensor] | None = None,
        images: list[torch.Tensor] | None = None,
        words: str = "which way ? A up B down",
    ) -> Example:
        clips, images = clips or [], images or []
        content = [{"type": "video"}] * len(clips) + [{"type": "image"}] * len(images)
        message = [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]
        text = self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        seen = [
            {"frames_indices": list(range(len(clip))), "fps": FPS, "total_num_frames": len(clip)}
            for clip in clips
        ]
        options = {"do_sample_frames": False, "video_metadata": seen} if clips else {}
        encoded = dict(
            self.processor(
                text=[text], videos=clips or None, images=images or None, return_tensors="pt", **options
            )
        )
        ids = [*encoded["input_ids"][0].tolist(), *answer]
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        media = {name: encoded[name] for name in names if name in encoded}
        shown = {**media, "second_per_grid_ts": [2 / FPS] * len(clips)}
        positions = positions_of(self.processor, ids, shown, tokens_per_second=2.0)
        return Example(torch.tensor(ids), positions, len(answer), media, uid, tuple(clips))


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    """The model family; a file asks for another one by ``BOTH_FAMILIES``."""
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def encoder(family: str) -> Encoder:
    return Encoder(family)


@pytest.fixture(scope="session")
def mixed(encoder: Encoder) -> dict[str, Example]:
    """Every kind of row in one ragged batch, two of them answers to one prompt."""
    walk, still, image = encoder.noise(4), encoder.noise(1), encoder.noise(1)[0]
    one = encoder.example
    return {
        "video": one("p0", encoder.answer(7), [walk]),
        "same video": one("p0", encoder.answer(3), [walk]),
        "image": one("p1", encoder.answer(5), images=[image, still[0]], words="what color"),
        "text": one("p2", encoder.answer(9), words="A red B blue"),
        "one frame": one("p3", encoder.answer(4), [still.expand(2, -1, -1, -1)]),
        "static": one("p4", encoder.answer(2), [still.expand(4, -1, -1, -1)]),
        "empty answer": one("p5", [], [encoder.noise(8)]),
        "two videos": one("p6", encoder.answer(6), [still.expand(2, -1, -1, -1), encoder.noise(4)]),
        "image and video": one("p7", encoder.answer(1), [encoder.noise(6)], [image]),
        "short text": one("p8", encoder.answer(1), words="A"),
    }


def batch_of_examples(examples: list[Example]) -> TensorDict:
    """The batch as verl hands it to a worker: ragged tensors, and media beside them."""

    def ragged(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": ragged([example.input_ids for example in examples]),
            "position_ids": ragged([example.position_ids for example in examples]),
            "responses": ragged([example.labels for example in examples]),
        },
        batch_size=[len(examples)],
    )
    data["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(example.media) for example in examples))
    data["uid"] = NonTensorStack(*(NonTensorData(example.uid) for example in examples))
    data["global_step"] = NonTensorData(1)
    return data


@pytest.fixture(scope="session")
def as_batch() -> Callable[[list[Example]], TensorDict]:
    return batch_of_examples


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    """A folder with ``model/``, where the demo's configuration looks for it."""
    folder = tmp_path_factory.mktemp("tiny_world")
    build_model(encoder.processor.tokenizer, seed=0, family=encoder.family).save_pretrained(folder / "model")
    encoder.processor.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def run_config(tiny_world: Path) -> Any:
    """The demo's configuration, for the tiny model."""
    from keytoken.main import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYTOKEN_DEMO_DIR", str(tiny_world))
        return load_config(["experiment=demo_cpu", f"keytoken.run_dir={tiny_world / 'run'}"])


@pytest.fixture(scope="module")
def worker(run_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real attribution worker in this process: verl's engine on a gloo group of one.

    One for each file, since a process has one group and other tests of it make their own.
    """
    from omegaconf import OmegaConf

    from keytoken.schema import KeyTokenConfig
    from keytoken.workers.actors import AttributionWorker

    place = {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        patch.setenv("DIST_INIT_METHOD", f"file://{tmp_path_factory.mktemp('group') / 'store'}")
        keytoken = KeyTokenConfig.from_mapping(OmegaConf.to_container(run_config.keytoken))
        yield AttributionWorker(run_config.actor_rollout_ref, keytoken)
        torch.distributed.destroy_process_group()


@pytest.fixture
def engine(worker: Any) -> Iterator[Any]:
    """The worker's engine in eval mode, its weights put back afterwards."""
    before = {name: value.clone() for name, value in worker.engine.module.state_dict().items()}
    with worker.engine.eval_mode():
        yield worker.engine
    worker.engine.module.load_state_dict(before)


@pytest.fixture(scope="session")
def vision_ids(tiny_world: Path) -> tuple[int, int]:
    config = AutoConfig.from_pretrained(tiny_world / "model")
    return config.image_token_id, config.video_token_id


def reference_logits(folder: Path, model: Path, cases: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Answer logits [R, V] by plain transformers, in a process that verl has not patched."""
    torch.save(cases, folder / "cases.pt")
    script = Path(__file__).with_name("reference.py")
    files = [model, folder / "cases.pt", folder / "logits.pt"]
    subprocess.run([sys.executable, script, *files], check=True, timeout=180)
    return torch.load(folder / "logits.pt")


def plain_case(example: Example, **changes: Any) -> dict[str, Any]:
    """An example as the reference program takes it."""
    case = {
        "input_ids": example.input_ids,
        "attention_mask": torch.ones_like(example.input_ids),
        "position_ids": example.positions,
        "response_length": example.response_length,
        **example.media,
    }
    return {**case, **changes}


@pytest.fixture(scope="session")
def placeholder_answer(encoder: Encoder, vision_ids: tuple[int, int]) -> Example:
    """A text prompt whose answer holds the video placeholder twice."""
    return encoder.example("p0", [5, vision_ids[1], 7, vision_ids[1], 9], words="A")


@pytest.fixture(scope="session")
def media_under(encoder: Encoder, run_config: Any, tiny_world: Path) -> Callable[[Example, str], dict]:
    """The pixel tensors of an example under a view; tests/attribution/views has their truth."""
    from keytoken.attribution.views import ViewContext, VisionFormat
    from keytoken.workers.attribution import view_row
    from keytoken.workers.rows import rows_of

    vision = VisionFormat.of(AutoConfig.from_pretrained(tiny_world / "model"), encoder.processor)
    context = ViewContext(vision=vision, seed=run_config.keytoken.attribution.shuffle_seed)

    def build(example: Example, name: str) -> dict[str, torch.Tensor]:
        (row,) = rows_of(batch_of_examples([example]))
        view = view_row(row, name, context)
        assert view is not None
        return view.media

    return build


@pytest.fixture(scope="session")
def frame_order(
    encoder: Encoder, mixed: dict[str, Example], media_under: Callable[[Example, str], dict]
) -> tuple[int, ...]:
    """The order of the video's frames for which the processor gives the pixels of the shuffled view."""
    (clip,) = mixed["video"].clips
    pixels = media_under(mixed["video"], "shuffled")["pixel_values_videos"]
    fitting = [
        order
        for order in itertools.permutations(range(len(clip)))
        if torch.equal(encoder.pixels([clip[list(order)]]), pixels)
    ]
    assert len(fitting) == 1
    return fitting[0]


@pytest.fixture(scope="session")
def truth(
    mixed: dict[str, Example],
    placeholder_answer: Example,
    frame_order: tuple[int, ...],
    media_under: Callable[[Example, str], dict],
    encoder: Encoder,
    vision_ids: tuple[int, int],
    tiny_world: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, torch.Tensor]]:
    """Reference logits [R, V] by view and row.

    ``real``, ``masked`` (kept positions) and ``compressed`` of every mixed row, ``shuffled`` of the two
    answers to the video, the other views of the rows ``SEEN_OTHERWISE``, and ``placeholder``: the real view
    of a text row with placeholders in its answer.
    """
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for name, example in mixed.items():
        cases["real", name] = plain_case(example)
        visible = (~torch.isin(example.input_ids, torch.tensor(vision_ids))).long()
        cases["masked", name] = plain_case(example, attention_mask=visible)
        # Every visible token at its place among the visible ones; the hidden ones anywhere.
        squeezed = (visible.cumsum(0) - 1).expand(3, -1)
        cases["compressed", name] = plain_case(example, attention_mask=visible, position_ids=squeezed)
    for name in ("video", "same video"):
        pixels = encoder.pixels([mixed[name].clips[0][list(frame_order)]])
        cases["shuffled", name] = plain_case(mixed[name], pixel_values_videos=pixels)
    for view, name in itertools.product(OTHER_VIEWS, SEEN_OTHERWISE):
        cases[view, name] = plain_case(mixed[name], **media_under(mixed[name], view))
    # The plain model counts placeholders against pixels, so this one's ids are looked up as words.
    cases["placeholder", "text"] = plain_case(placeholder_answer, inputs_as_embeddings=True)
    answers: dict[str, dict[str, torch.Tensor]] = {}
    logits = reference_logits(
        tmp_path_factory.mktemp("reference"), tiny_world / "model", list(cases.values())
    )
    for (view, name), rows in zip(cases, logits, strict=True):
        answers.setdefault(view, {})[name] = rows
    return answers
