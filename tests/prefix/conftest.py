"""Groups of answers of every modality, models of both families, and separate stock passes as the truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat
from keytoken.data.families import MODEL_TYPES, positions_of
from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import CONTRACTS, build_processor, build_tokenizer
from keytoken.prefix.attention import Plan
from keytoken.prefix.packs import Pack

FPS = 3  # no whole number of seconds in a patch
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
# Answers in the order of a batch: groups of unequal size, some of them in pieces, answers of unequal length.
ANSWERS = (
    ("walk", 7),
    ("walk", 1),
    ("picture", 5),
    ("words", 4),
    ("walk", 12),
    ("long walk", 9),
    ("words", 0),
    ("picture", 2),
    ("words", 6),
    ("walk", 3),
)


class Maker:
    """Makes inputs with the real processor of a family.

    Attributes:
        inputs: ``ANSWERS``, as the trainer holds them.
        context: For views of them.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.processor = build_processor(build_tokenizer(family), family)
        self.side = int(CONTRACTS[family].max_pixels ** 0.5)
        self.generator = torch.Generator().manual_seed(5)
        shown: dict[str, dict[str, Any]] = {
            "walk": {"videos": [self.frames(4)]},
            "long walk": {"videos": [self.frames(8)]},
            "picture": {"images": [self.frames(1)[0]]},
            "words": {},
        }
        prompts = {name: self.prompt(**media) for name, media in shown.items()}
        self.inputs = [self.answered(name, *prompts[name], length) for name, length in ANSWERS]
        vision = VisionFormat.of(self.model().config, self.processor)
        self.context = ViewContext(vision=vision, seed=3)

    def model(self) -> Any:
        return build_model(self.processor.tokenizer, seed=0, family=self.family)

    def frames(self, count: int) -> torch.Tensor:
        shape = (count, 3, self.side, self.side)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    def prompt(self, **media: list[torch.Tensor]) -> tuple[list[int], dict[str, torch.Tensor]]:
        kinds = [{"type": kind.removesuffix("s")} for kind in media]
        message = [{"role": "user", "content": [*kinds, {"type": "text", "text": "which way ? A up B down"}]}]
        text = self.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        clips = media.get("videos", [])
        options: dict[str, Any] = {"do_sample_frames": False} if clips else {}
        if clips:
            options["video_metadata"] = [
                {"frames_indices": list(range(len(clip))), "fps": FPS, "total_num_frames": len(clip)}
                for clip in clips
            ]
        encoded = self.processor(text=[text], return_tensors="pt", **media, **options)
        return encoded["input_ids"][0].tolist(), {name: encoded[name] for name in MEDIA if name in encoded}

    def answered(
        self, name: str, prompt: list[int], media: dict[str, torch.Tensor], length: int
    ) -> ModelInput:
        ids = [*prompt, *torch.randint(0, 200, (length,), generator=self.generator).tolist()]
        seconds = [2 / FPS] * len(media.get("video_grid_thw", ()))
        positions = positions_of(self.processor, ids, {**media, "second_per_grid_ts": seconds}, 2.0)
        return ModelInput(
            input_ids=torch.tensor(ids),
            position_ids=torch.cat([torch.arange(len(ids))[None], positions]),
            prompt_length=len(prompt),
            media={key: value.clone() for key, value in media.items()},  # a batch carries one for each row
            prompt=name,
        )

    def under(self, view: str) -> list[ModelInput]:
        """The inputs that have a view, under it."""
        if view == "real":
            return self.inputs
        seen = [VIEWS[view].build(one, self.context) for one in self.inputs]
        return [one for one in seen if one is not None]

    def having(self, view: str) -> list[ModelInput]:
        """The same inputs without it."""
        if view == "real":
            return self.inputs
        return [one for one in self.inputs if VIEWS[view].build(one, self.context) is not None]


@pytest.fixture(scope="session", params=MODEL_TYPES)
def maker(request: pytest.FixtureRequest) -> Maker:
    return Maker(request.param)


@pytest.fixture(scope="session")
def qwen2_5() -> Maker:
    return Maker("qwen2_5_vl")


def separate_log_probs(model: Any, one: ModelInput, hidden: Sequence[int] = ()) -> torch.Tensor:
    """[R] nats by a stock forward pass over one prompt and answer; ids in ``hidden`` are not attended to."""
    visible = torch.ones_like(one.input_ids)
    visible[: one.prompt_length][
        torch.isin(one.input_ids[: one.prompt_length], torch.tensor(list(hidden), dtype=torch.int64))
    ] = 0
    logits = model(
        input_ids=one.input_ids[None],
        position_ids=one.position_ids[1:, None],
        attention_mask=visible[None] if len(hidden) else None,
        use_cache=False,
        **one.media,
    ).logits[0]
    predicting = logits[one.prompt_length - 1 : -1].log_softmax(-1)
    return predicting.gather(1, one.input_ids[one.prompt_length :, None])[:, 0]


def packed_log_probs(model: Any, pack: Pack, plan: Plan | None = None, **changes: Any) -> torch.Tensor:
    """[N] nats by one pass over a pack."""
    inputs = {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[:, None],
        "prefix_plan": Plan(pack.trees) if plan is None else plan,
        **pack.media,
        **changes,
    }
    logits = model(**inputs, use_cache=False, logits_to_keep=pack.rows).logits[0]
    return logits.log_softmax(-1).gather(1, pack.labels[:, None])[:, 0]


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """What flash-attn's ``flash_attn_varlen_func`` is documented to compute, in float64, with gradients.

    q [Q, heads, D], k and v [K, key heads, D]; segments by their starts; a causal mask aligned at the ends.
    """
    found = []
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    repeats = q.shape[1] // k.shape[1]
    for number in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[number] : cu_seqlens_q[number + 1]].double()
        span = slice(cu_seqlens_k[number], cu_seqlens_k[number + 1])
        keys, values = (part[span].double().repeat_interleave(repeats, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if causal:
            allowed = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
            scores = scores.masked_fill(~allowed, -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(found).to(q.dtype)


@pytest.fixture
def tools() -> SimpleNamespace:
    """The functions above; a test file cannot import its conftest."""
    return SimpleNamespace(separate=separate_log_probs, packed=packed_log_probs, varlen=varlen_attention)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' flash attention with a kernel that runs here; all of its own code is real."""
    from transformers import modeling_flash_attention_utils as flash

    supported = defaultdict(bool, max_seqlen_q=True, max_seqlen_k=True)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=supported)
    kernels = (None, varlen_attention, None, None, None)  # flash_attn_func and padding are not needed
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _: (kernels, process))


@pytest.fixture
def sharing(maker: Maker) -> Callable[..., Any]:
    """A model that can follow plans, with some attention implementation of its text layers."""
    from keytoken.prefix.attention import share_prefix

    def build(implementation: str = "sdpa") -> Any:
        model = maker.model().eval()
        model.config.get_text_config()._attn_implementation = implementation
        share_prefix(model)
        return model

    return build


@pytest.fixture(scope="session")
def truth(maker: Maker) -> Callable[[str], list[torch.Tensor]]:
    """Log-probs of every input that has a view, each by a stock pass of its own; scored once."""
    model, scored = maker.model().eval(), dict[str, list[torch.Tensor]]()

    @torch.no_grad()
    def score(view: str) -> list[torch.Tensor]:
        if view not in scored:
            # The masked view against the pass whose attention hides the vision tokens, pixels and all.
            masked = view == "masked"
            inputs = maker.having(view) if masked else maker.under(view)
            hidden = maker.context.vision.token_ids if masked else ()
            scored[view] = [separate_log_probs(model, one, hidden) for one in inputs]
        return scored[view]

    return score
