"""Every case in the order of its importance: what does not fit the time is at the end."""

from __future__ import annotations

import torch

from kernel_bench import matrix_head as head
from kernel_bench import matrix_logits as logits
from kernel_bench import matrix_selection as selection
from kernel_bench.cases import Case
from kernel_bench.inputs import SCOPES
from kernel_bench.sizes import SELECTED_SHARE, Sizes

SHARES = (SELECTED_SHARE, 1.0, 0.2)
BF16, FP32 = torch.bfloat16, torch.float32


def gpu_cases(sizes: Sizes) -> list[Case]:
    """What a GPU runs: first whatever has a target."""
    n2, n4, n8, n16, n32 = sizes.tokens
    return [
        logits.forward(sizes, n16, BF16, targets=logits.FORWARD_TARGETS, slow=True),
        logits.backward(sizes, n16, BF16, 1.0, targets=logits.BACKWARD_TARGETS),
        logits.forward(sizes, n16, FP32, targets=logits.FORWARD_TARGETS),
        *(selection.selection(sizes, sizes.batches[-1], scope, targets=True) for scope in SCOPES),
        head.worked_example(sizes, n32),
        head.views(sizes, n8, slow=True),
        head.update(sizes, n8, SELECTED_SHARE),
        head.views(sizes, n32),
        head.update(sizes, n32, SELECTED_SHARE),
        *(logits.backward(sizes, n16, dtype, SELECTED_SHARE) for dtype in (FP32, BF16)),
        logits.both(sizes, n4, BF16, slow=True),
        *(selection.selection(sizes, sizes.batches[0], scope) for scope in SCOPES),
        head.update(sizes, n8, 1.0, slow=True),
        head.update(sizes, n8, 0.2),
        head.update_of_selected(sizes, n8, SELECTED_SHARE),
        head.views(sizes, n2),
        *(head.update(sizes, n2, share) for share in SHARES),
        logits.backward(sizes, n16, BF16, 0.2),
        *(logits.forward(sizes, n, dtype) for n in (n4, n2) for dtype in (FP32, BF16)),
        logits.nucleus(sizes, n4),
        logits.forward(sizes, n32, BF16),
        head.chunks(sizes, n8),
        *(head.update(sizes, n32, share) for share in SHARES[1:]),
    ]


def cpu_cases(sizes: Sizes) -> list[Case]:
    """What a CPU runs: every operator once, in the reference."""
    n8, n32 = sizes.tokens[2], sizes.tokens[4]
    return [
        logits.forward(sizes, n8, FP32),
        head.views(sizes, n8),
        *(selection.selection(sizes, sizes.batches[0], scope) for scope in SCOPES),
        head.update(sizes, n8, SELECTED_SHARE),
        logits.backward(sizes, n8, FP32, SELECTED_SHARE),
        head.worked_example(sizes, n32),
        head.update(sizes, n8, 1.0),
        logits.nucleus(sizes, n8),
    ]
