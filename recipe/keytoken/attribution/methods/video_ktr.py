"""Video-KTR: a hard mask over tokens that depend on the video, on the frame order, or are uncertain.

Source: Video-KTR (arXiv 2601.19686, ICLR 2026)::

    vis_{i,t}  = | log p(o_t | video)   - log p(o_t | no video) |
    temp_{i,t} = | log p(o_t | ordered) - log p(o_t | shuffled) |
    H_{i,t}    = - sum_w p(w) log p(w)
    w_{i,t}    = 1[ t in top r%(vis)  or  top r%(temp)  or  top r%(H) ],  r = 20
    J          = E[ 1/G sum_i 1/|o_i| sum_t w_{i,t} min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) ]

as two notes on the paper give it; the paper itself was not seen. The published code departs from it, so there
are two presets of this one formula:

    ==================  ===========================  ====================================
    what                video_ktr (the paper)        video_ktr_official (the code)
    ==================  ===========================  ====================================
    sign of a score     absolute                     signed: a token that the video makes
                                                     less likely is never selected
    scope of top r%     not stated; here response    all answers to one prompt (group)
    rule                not stated; here as right    score >= linear (1 - r) quantile
    denominator         |o_i|, all tokens            number of selected tokens of o_i
    clipping            eps = 0.2                    none: one on-policy step, rho = 1
    KL, beta = 0.04     not stated; here all tokens  selected tokens, over their number
    no token selected   contributes 0                0/0 = NaN; here contributes 0
    masked view         features set to zero; here   attention mask over the pads, after
                        vision tokens dropped        which the text moves to the front
                        and positions kept           (positions: compressed)
    shuffled view       random order                 random order, identity possible;
                                                     here the identity is excluded
    images              visual and entropy           the same
    ==================  ===========================  ====================================
"""

from __future__ import annotations

from keytoken.attribution.selection import select_tokens
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Weight 1 on the union of the selected tokens; on all tokens if ``config.selection`` is None."""
    return select_tokens(signals, config, impl)
