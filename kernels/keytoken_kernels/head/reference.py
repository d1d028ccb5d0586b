"""Log-prob and entropy of answer tokens from hidden states, in row chunks and full precision.

For row ``n`` with logits ``z = W h_n / temperature``::

    log_prob[n] = z[y_n] - logsumexp(z)
    entropy[n]  = logsumexp(z) - sum_v softmax(z)_v z_v        (nats)

No ``[N, V]`` array is kept: one chunk of rows at a time is multiplied, reduced and dropped.
"""

import torch
from torch import Tensor

# One chunk of fp32 logits of a 152k vocabulary is then 152 MiB.
DEFAULT_CHUNK_ROWS = 256


@torch.no_grad()
def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Log-prob of ``labels`` and entropy of the whole distribution, both in nats.

    Products and reductions run in float32 whatever the dtype of the inputs, because scores rank small
    differences of these log-probs and bf16 logits change which tokens are selected.

    Args:
        hidden: ``[N, H]`` last hidden states, row ``n`` being the one that predicts ``labels[n]``.
        weight: ``[V, H]`` weight of the language-model head.
        labels: ``[N]`` int64 token ids.
        temperature: divides the logits; must be positive.
        chunk_rows: rows of logits alive at a time.

    Returns:
        ``(log_prob, entropy)``, float32 ``[N]`` each.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, or a temperature <= 0.
    """
    _check(hidden, weight, labels, temperature)
    num_rows = hidden.shape[0]
    log_prob = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(log_prob)
    head = weight.float()
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = torch.nn.functional.linear(hidden[rows].float(), head) / temperature
        log_p = torch.log_softmax(logits, dim=-1)
        log_prob[rows] = log_p.gather(1, labels[rows, None]).squeeze(1)
        # xlogy-style guard: p * log p is 0, not NaN, where a logit is -inf.
        p = log_p.exp()
        entropy[rows] = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_prob, entropy


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [N] = [{hidden.shape[0]}]; got {tuple(labels.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= weight.shape[0]):
        raise ValueError(
            f"labels must lie in [0, {weight.shape[0]}); got [{int(labels.min())}, {int(labels.max())}]"
        )
