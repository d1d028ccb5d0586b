"""The demo's reward: Video-R1's rules, with the labels that the final table groups answers by."""

from typing import Any

from keytoken.rewards.score import compute_score as video_r1_score

LABELS = ("prompt_id", "family", "decoding", "control")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **weights: Any
) -> dict[str, Any]:
    """See :func:`keytoken.rewards.score.compute_score`; adds the row's labels, which are no metrics."""
    labels = {name: extra_info.get(name) or "" for name in LABELS}
    return {**video_r1_score(data_source, solution_str, ground_truth, extra_info, **weights), **labels}
