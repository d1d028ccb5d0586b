"""The colour scale of a signal, one for a whole exported step, so that answers can be compared.

Page and picture colour by the same bounds: the page's scripts take :data:`PART` from its data.
"""

import numpy as np

from keytoken.lens.read import Export

# Of the values that are not 0, the share that keeps within the scale; the few above it have its last colour.
PART = 0.97


def top_of(export: Export, name: str) -> float:
    """Where the colours of a signal end: 0.97 of its magnitudes above 0 lie below; 1 if there are none."""
    rows = [np.abs(answer.values[name]) for answer in export.answers if name in answer.values]
    values = np.concatenate(rows) if rows else np.empty(0, dtype=np.float32)
    values = np.sort(values[values > 0])  # NaN is not
    return float(values[int(PART * (len(values) - 1))]) if len(values) else 1.0
