"""A reward for tests: any answer earns something, equal answers earn the same, different ones differ."""

import zlib
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
) -> dict[str, float]:
    score = (zlib.crc32(solution_str.encode()) % 11) / 10
    return {"score": score, "acc": score}
