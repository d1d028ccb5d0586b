"""The Parquet schema of verl's RL dataset, as the writers of datasets here share it."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import pyarrow as pa

Fields: TypeAlias = Sequence[tuple[str, Any]]


def row_schema(*, video: Fields, extra_info: Fields, image: Fields = ()) -> pa.Schema:
    """The schema of a dataset.

    Args:
        video: Fields of an entry of ``videos`` beside its path.
        extra_info: Fields of ``extra_info``.
        image: Fields of an entry of ``images``; none for a dataset without images.
    """
    images = [("images", pa.list_(pa.struct(list(image))))] if image else []
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("videos", pa.list_(pa.struct([("video", pa.string()), *video]))),
            *images,
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct(list(extra_info))),
        ]
    )
