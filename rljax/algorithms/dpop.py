"""DPOP, DPO-Positive: the chosen completion stays as likely as under the reference (Smaug, arXiv:2402.13228).

    L = (1/N) Σ_i -log σ(β(Δ_w - Δ_l - λ max(0, -Δ_w)))        eq. 3

DPO lowers the probability of a chosen completion that shares most of its tokens with the rejected one; the penalty
takes that way of winning the comparison.
"""

from functools import partial

from rljax.algorithms.dpo import dpo
from rljax.ops import preferences
from rljax.types import Objective, PolicyFn


def dpop(policy: PolicyFn, beta: float = 0.3, lam: float = 50.0) -> Objective:
    """DPOP. `lam`: λ, the weight of the chosen completion's fall below the reference."""
    return dpo(policy, partial(preferences.dpop_loss, lam=lam), beta)
