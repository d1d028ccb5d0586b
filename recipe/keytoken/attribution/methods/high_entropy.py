"""80/20: only the fifth of the tokens in which the policy was most uncertain.

Source: Beyond the 80/20 Rule (arXiv 2506.01939), over DAPO without KL::

    w_{i,t} = 1[ H_{i,t} among the ceil(0.2 N) largest of all N response tokens ]
    L       = sum_{i,t} w_{i,t} l_{i,t} / sum_{i,t} w_{i,t}

Departures: the published code takes the tokens of one micro-batch of the update, with entropies of the policy
in its current state; here of the whole rollout batch, with those of the policy that sampled. So nothing
depends on how a batch is cut, and with one update a batch, the policies are the same. Ties are broken by a
seeded draw.
"""

from __future__ import annotations

from keytoken.attribution.selection import select_tokens
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Weight 1 on the most uncertain tokens."""
    return select_tokens(signals, config, impl)
