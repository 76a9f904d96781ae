"""Estimators of KL(π ‖ π_ref) from one drawn token (Schulman, "Approximating KL divergence", 2020).

With d = log π - log π_ref at a token drawn from π. What an estimator's *value* averages to and what its *gradient*
averages to when it stands in a loss are different questions (arXiv:2510.01555):

    name                      value      mean of the value   gradient in a loss, on-policy
    k1                        d          KL                  0: it regularises nothing
    k2                        d²/2       biased              ∇ KL(π ‖ π_ref): right
    k3                        e⁻ᵈ-1+d    KL                  ∇ KL(π_ref ‖ π): of the other KL
    k3_with_k2_gradient       as k3      KL                  ∇ KL(π ‖ π_ref): right
    importance_weighted_k3    ρ·k3       KL, off-policy too  ∇ KL(π ‖ π_ref): right, off-policy too

Use k1 in rewards (no gradient flows there) and the others in losses. Exponents are clamped to ±20, with no gradient
beyond.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbs = Float[Array, "*shape"]


def k1(logp: LogProbs, ref_logp: LogProbs) -> LogProbs:
    """d: unbiased value, may be negative; no gradient on average."""
    return logp - ref_logp


def k2(logp: LogProbs, ref_logp: LogProbs) -> LogProbs:
    """d²/2: biased value, right gradient."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: LogProbs, ref_logp: LogProbs) -> LogProbs:
    """e⁻ᵈ - 1 + d: unbiased value, never negative; gradient of KL(π_ref ‖ π). GRPO's (arXiv:2402.03300, eq. 4)."""
    minus_d = jnp.clip(ref_logp - logp, -20.0, 20.0)
    return jnp.expm1(minus_d) - minus_d


def k3_with_k2_gradient(logp: LogProbs, ref_logp: LogProbs) -> LogProbs:
    """k3's value with k2's gradient: both are right on-policy."""
    value, slope = k3(logp, ref_logp), k2(logp, ref_logp)
    return slope + jax.lax.stop_gradient(value - slope)


def importance_weighted_k3(logp: LogProbs, ref_logp: LogProbs, old_logp: LogProbs) -> LogProbs:
    """(π/π_old)·k3 with the ratio differentiated: value and gradient right off-policy too (arXiv:2512.02556)."""
    return jnp.exp(jnp.clip(logp - old_logp, -20.0, 20.0)) * k3(logp, ref_logp)
