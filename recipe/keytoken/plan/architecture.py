"""The shape of a model, from its config.json or the table of released ones, and its parameters by part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keytoken.data.families import MODEL_TYPES
from keytoken.errors import ConfigurationError
from keytoken.resources import is_local_model

CHANNELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The language model. ``tied``: the head is the embedding; ``qk_norm``: Qwen3's, which has no biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qk_norm: bool

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        extra = 2 * self.head_dim if self.qk_norm else queries + 2 * keys
        attention = self.hidden * (2 * queries + 2 * keys) + extra
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and as many again of a head that is not tied to it."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of all of it."""
        ends = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends + self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """The vision tower.

    Attributes:
        window: Edge in pixels of the windows to which attention is confined; None for whole frames.
        full_blocks: With windows: the number of blocks that see whole frames all the same.
        deepstack: How many inner blocks send features to the language model (Qwen3-VL).
        positions: Learnt positions (Qwen3-VL), 0 for none.
    """

    hidden: int
    intermediate: int
    depth: int
    out_hidden: int
    patch: int
    merge: int
    temporal_patch: int
    window: int | None
    full_blocks: int
    deepstack: int
    positions: int

    @property
    def _qwen3(self) -> bool:
        return self.positions > 0

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return CHANNELS * self.temporal_patch * self.patch**2

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        attention = 4 * self.hidden**2 + 4 * self.hidden
        matrices = 2 if self._qwen3 else 3  # a gate
        mlp = matrices * self.hidden * self.intermediate + (matrices - 1) * self.intermediate + self.hidden
        return attention + mlp + (4 if self._qwen3 else 2) * self.hidden

    @property
    def merger_products(self) -> int:
        """Of one merger: multiplications for one vision token, also its matrices' size."""
        wide = self.hidden * self.merge**2
        return wide * wide + wide * self.out_hidden

    @property
    def parameters(self) -> int:
        """Of all of it."""
        wide = self.hidden * self.merge**2
        merger = self.merger_products + wide + self.out_hidden
        embed = self.patch_values * self.hidden
        if not self._qwen3:
            return embed + self.depth * self.block_parameters + merger + self.hidden
        embed += self.hidden + self.positions * self.hidden
        mergers = merger + 2 * self.hidden + self.deepstack * (merger + 2 * wide)
        return embed + self.depth * self.block_parameters + mergers


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's shape; ``source`` says where it was found."""

    text: Text
    vision: Vision
    source: str

    @property
    def parameters(self) -> int:
        """As transformers counts them: tied ones once."""
        return self.text.parameters + self.vision.parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Architecture:
        """Read a config.json, of today's layout or of the one without ``text_config``.

        Raises:
            ConfigurationError: another family, or a key is missing.
        """
        if config.get("model_type") not in MODEL_TYPES:
            raise ConfigurationError(
                f"{source}: model_type is {config.get('model_type')!r}; plans are made for "
                f"{' and '.join(MODEL_TYPES)}."
            )
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        try:
            tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
            return cls(_text(text, config["model_type"], tied), _vision(vision, config["model_type"]), source)
        except KeyError as missing:
            raise ConfigurationError(f"{source}: {missing} is missing; take the model's own file.") from None


def architecture_of(path: str) -> Architecture:
    """Of a model's folder on this machine, or of a released model by its name on the hub.

    Raises:
        ConfigurationError: neither.
    """
    if is_local_model(path):
        file = Path(path).expanduser() / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise ConfigurationError(
                f"actor_rollout_ref.model.path={path}: its config.json cannot be read ({problem}); give a "
                f"folder that has one, or one of {', '.join(RELEASED)}."
            ) from problem
        return Architecture.from_config(config, str(file))
    if path not in RELEASED:
        raise ConfigurationError(
            f"actor_rollout_ref.model.path={path} is not on this machine and not among the models whose "
            f"shape is known here ({', '.join(RELEASED)}); download its config.json and give its folder."
        )
    return Architecture.from_config(RELEASED[path], path)


def _text(config: Mapping[str, Any], model_type: str, tied: bool) -> Text:
    heads = config["num_attention_heads"]
    return Text(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=tied,
        qk_norm=model_type == "qwen3_vl",
    )


def _vision(config: Mapping[str, Any], model_type: str) -> Vision:
    windows = model_type == "qwen2_5_vl"
    return Vision(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        depth=config["depth"],
        out_hidden=config["out_hidden_size"],
        patch=config.get("patch_size", 14 if windows else 16),
        merge=config.get("spatial_merge_size", 2),
        temporal_patch=config.get("temporal_patch_size", 2),
        window=config["window_size"] if windows else None,
        full_blocks=len(config["fullatt_block_indexes"]) if windows else config["depth"],
        deepstack=0 if windows else len(config["deepstack_visual_indexes"]),
        positions=0 if windows else config["num_position_embeddings"],
    )


def _qwen2_5(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    vision = {
        **{
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
        **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    }
    text = _sizes(hidden, intermediate, layers, heads, kv_heads) | {"vocab_size": 151936 if tied else 152064}
    return _model("qwen2_5_vl", text, vision, tied)


def _qwen3(
    hidden: int, intermediate: int, tied: bool, depth: int, width: int, wide: int, deepstack: list[int]
) -> dict[str, Any]:
    vision = {
        **{"depth": depth, "hidden_size": width, "intermediate_size": wide, "num_heads": 16},
        **{"out_hidden_size": hidden, "patch_size": 16, "num_position_embeddings": 2304},
        "deepstack_visual_indexes": deepstack,
    }
    text = _sizes(hidden, intermediate, 36, 32, 8) | {"head_dim": 128, "vocab_size": 151936}
    return _model("qwen3_vl", text, vision, tied)


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _model(model_type: str, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


_QWEN2_5_7B = _qwen2_5(3584, 18944, 28, 28, 4, tied=False)

# What the config.json of released models says, as far as sizes go.
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(2048, 11008, 36, 16, 2, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN2_5_7B,
    "Video-R1/Qwen2.5-VL-7B-COT-SFT": _QWEN2_5_7B,
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(2560, 9728, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(4096, 12288, False, 27, 1152, 4304, [8, 16, 24]),
}
