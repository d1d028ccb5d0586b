"""Every tensor KeyToken adds to a batch: its name, shape, unit, writer and reader.

Shapes: ``B`` answers in the batch, ``T`` tokens of an answer (ragged; padded to the longest where needed).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """One named tensor that crosses a process boundary."""

    name: str
    shape: str
    unit: str
    written_by: str
    read_by: str


REAL_LOG_PROB = "attribution_log_prob_real"
MASKED_LOG_PROB = "attribution_log_prob_masked"
SHUFFLED_LOG_PROB = "attribution_log_prob_shuffled"
HAS_VISUAL = "attribution_has_visual"
HAS_TEMPORAL = "attribution_has_temporal"
STATIC_CLIP = "attribution_static_clip"
TRUNCATED_ENTROPY = "attribution_truncated_entropy"
DISAGREEMENT = "attribution_disagreement"
COLLISION = "attribution_collision"
VERSION = "attribution_version"
PASS_SECONDS = "attribution_seconds"
TOKEN_WEIGHT = "token_weight"
LOSS_TOTALS = "loss_totals"

_PASSES, _TRAINER, _LOSS = "attribution passes", "trainer", "policy loss"
_BOTH = f"{_TRAINER}, {_LOSS}"

FIELDS = (
    Field(REAL_LOG_PROB, "[B, T]", "nats", _PASSES, _TRAINER),
    Field(MASKED_LOG_PROB, "[B, T]", "nats, equal to real without vision", _PASSES, _BOTH),
    Field(SHUFFLED_LOG_PROB, "[B, T]", "nats, equal to real without frames", _PASSES, _TRAINER),
    Field(HAS_VISUAL, "[B]", "0 or 1: the prompt holds an image or a video", _PASSES, _BOTH),
    Field(HAS_TEMPORAL, "[B]", "0 or 1: the prompt holds a video whose frames differ", _PASSES, _TRAINER),
    Field(STATIC_CLIP, "[B]", "0 or 1: the prompt's videos show one picture only", _PASSES, _TRAINER),
    Field(TRUNCATED_ENTROPY, "[B, T]", "nats, real input", _PASSES, _TRAINER),
    Field(DISAGREEMENT, "[B, T]", "TW-GRPO's, equal for all answers to a prompt", _PASSES, _TRAINER),
    Field(COLLISION, "[B, T]", "sum of squared probabilities, real input", _PASSES, _TRAINER),
    Field(VERSION, "[B]", "global step of the weights that scored", _PASSES, _TRAINER),
    Field(PASS_SECONDS, "[B]", "seconds of the rank that scored the row, all passes", _PASSES, _TRAINER),
    Field(TOKEN_WEIGHT, "[B, T]", "dimensionless", _TRAINER, "policy loss, export"),
    Field(LOSS_TOTALS, "[B, 3]", "responses, tokens, selected tokens of the mini-batch", _TRAINER, _LOSS),
)

PASS_OUTPUTS = tuple(field.name for field in FIELDS if field.written_by == _PASSES)
# What the pass over the real input may measure, by the name that a method and its signals know it by.
MEASURES = {"truncated_entropy": TRUNCATED_ENTROPY, "disagreement": DISAGREEMENT, "collision": COLLISION}
# Of the two first views, whose "applies" says something of the prompt itself.
_APPLIES = {"masked": HAS_VISUAL, "shuffled": HAS_TEMPORAL}


def view_outputs(view: str) -> tuple[str, str]:
    """The fields that the pass of a view adds.

    Returns:
        The name of the log-probs under the view, [B, T] in nats, equal to the real ones in rows that have no
        such view, and the name of "applies", [B], 0 or 1: whether the row has it.
    """
    return f"attribution_log_prob_{view}", _APPLIES.get(view, f"attribution_has_{view}")


def pass_seconds(view: str) -> str:
    """The field of what one pass took, [B] seconds of the rank that scored the row.

    Args:
        view: a view, or "real" for the pass over the real input.
    """
    return f"{PASS_SECONDS}_{view}"
