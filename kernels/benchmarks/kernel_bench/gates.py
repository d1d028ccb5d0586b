"""All gates by name. No time is printed unless every one of them passes."""

from __future__ import annotations

from kernel_bench import gates_logits, gates_selection
from kernel_bench.verdicts import Gate

GATES: dict[str, Gate] = {
    "K1 forward": gates_logits.log_prob_forward,
    "K1 bits": gates_logits.log_prob_bits,
    "K1 gradient": gates_logits.log_prob_gradient,
    "K1 nucleus": gates_logits.nucleus,
    "K4 forward": gates_logits.head_forward,
    "K4 update": gates_logits.head_update,
    "K2 selected": gates_selection.selected_sets,
    "K2 bits": gates_selection.selected_bits,
    "K2 counts": gates_selection.exact_counts,
}
