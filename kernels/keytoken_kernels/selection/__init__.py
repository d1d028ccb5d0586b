"""Selection of tokens by the top share of up to three signals, with weights and advantages."""

from keytoken_kernels.selection.api import select
from keytoken_kernels.selection.reference import group_advantages
from keytoken_kernels.selection.types import COUNTS, TOTALS, Segments, Selection, Signal

__all__ = ["COUNTS", "TOTALS", "Segments", "Selection", "Signal", "group_advantages", "select"]
