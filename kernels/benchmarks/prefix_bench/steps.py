"""The training side of a step, put together from the passes that were timed."""

from __future__ import annotations

PLAIN, SEPARATE, SHARED = "plain GRPO, stock", "Video-KTR, separate", "Video-KTR, shared"


def steps_of(time_of: dict[str, float]) -> dict[str, float]:
    """Seconds of old log-probs, views if there are any, and update, for the answers to one prompt."""
    return {
        PLAIN: time_of["score_stock"] + time_of["update_stock"],
        **{
            name: sum(time_of[f"{part}_{way}"] for part in ("score", "views", "update"))
            for name, way in ((SEPARATE, "separate"), (SHARED, "shared"))
        },
    }
