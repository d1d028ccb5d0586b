"""ToR: tokens of reasoning count in full, tokens of perception by half, the rest not at all.

Source: ToR (arXiv 2603.25077), over GRPO or DAPO::

    H_{i,t} = entropy of the policy's top-p truncated next-token distribution, p = 0.95         (its eq. 5)
    S_{i,t} = | log p(o_t | image) - log p(o_t | no image) |                                    (eq. 8)
    T_r     = the 30 % of all response tokens of the rollout batch with the largest H           (eq. 6-7)
    T_p     = the 30 % with the largest S                                                       (eq. 9)
    w_{i,t} = 1.0 if t in T_r;  0.5 if t in T_p and not in T_r;  0 otherwise
    L       = sum_{i,t} w_{i,t} l_{i,t} / sum_i |o_i|,  l the token loss of GRPO or DAPO

There is no official code, and the paper's text was not seen. Its reviews confirm S, the shares and the batch;
the equations, the weights, and that tokens in both sets have that of reasoning, are as a public
re-implementation and a note on the paper give them. Reconstructed beyond that:

- Exactly 30 % are kept, rounded up, and ties are broken by a seeded draw. With p = 0.95 most entropies are
  exactly 0, so a threshold at the quantile, read literally, would keep every token.
- The probabilities of the truncated distribution are made to sum to 1.
- The denominator is all response tokens. A public re-implementation has it so; the paper's was not seen.
- The image is removed by dropping the vision tokens and leaving the others where they were; how the paper
  removes it was not seen. Prompts without a picture have reasoning tokens only, and the 30 % of S are of the
  tokens that have an S.
"""

from __future__ import annotations

from keytoken.attribution.selection import select_tokens
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """The two weights; a token in both sets has that of reasoning, which is asked first."""
    return select_tokens(signals, config, impl, order=("entropy", "visual", "temporal"))
