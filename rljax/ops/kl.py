"""KL divergences: exact ones, and estimators of KL(π ‖ π_ref) from one sampled token.

With d = log π - log π_ref at a token sampled from π, or from an older policy where a factor ρ = π/π_old is given. What
an estimator's *value* averages to and what its *gradient* averages to in a loss are different questions
(Schulman, "Approximating KL divergence", 2020; arXiv:2510.01555). All rows are verified by enumeration:

    name                      value      mean of the value   gradient in a loss, on-policy       use
    k1                        d          KL                  0: no regularization                reward, metric
    absolute                  |d|        biased              of neither KL                       metric
    k2                        d²/2       biased              ∇ KL(π ‖ π_ref): right              loss
    k3                        e⁻ᵈ-1+d    KL                  ∇ KL(π_ref ‖ π): of the other KL    metric; loss (GRPO's)
    k1_with_k2_gradient       as k1      KL                  ∇ KL(π ‖ π_ref): right              loss
    k3_with_k2_gradient       as k3      KL                  ∇ KL(π ‖ π_ref): right              loss

    off-policy too:
    importance_weighted_k1    ρ·d        KL                  ∇ KL(π ‖ π_ref): right              loss
    importance_weighted_k2    sg(ρ)·k2   biased, as k2       ∇ KL(π ‖ π_ref): right              loss
    importance_weighted_k3    ρ·k3       KL                  ∇ KL(π ‖ π_ref): right              loss

In rewards no gradient flows: there only the value counts, and the sum of k1 over a completion is log π/π_ref of the
whole completion. In losses these give the KL of each decision at the visited states; the effect of a token on the KL of
later states is only in the reward-to-go. Exponents are clamped to ±20, with no gradient beyond.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.ops.ratios import importance_ratio
from rljax.ops.shapes import Elementwise

Logits = Float[Array, "*N V"]
KLEstimator = Callable[[Elementwise, Elementwise], Elementwise]  # (logp, ref_logp) -> KL of each decision


def k1(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """d: unbiased value, may be negative; no gradient on average."""
    return logp - ref_logp


def absolute(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """|d|. Its gradient is 0 where the two agree, as in every first update."""
    d = logp - ref_logp
    return jnp.where(d == 0, 0.0, jnp.abs(d))  # jnp.abs alone has slope 1 at 0


def k2(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """d²/2: biased value, right gradient."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """e⁻ᵈ - 1 + d: unbiased value, never negative; gradient of KL(π_ref ‖ π). GRPO's (arXiv:2402.03300, eq. 4)."""
    minus_d = jnp.minimum(ref_logp - logp, 20.0)
    return jnp.expm1(minus_d) - minus_d


def k1_with_k2_gradient(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """k1's value with k2's gradient: both are right on-policy."""
    return _with_k2_gradient(k1(logp, ref_logp), logp, ref_logp)


def k3_with_k2_gradient(logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    """k3's value with k2's gradient: both are right on-policy."""
    return _with_k2_gradient(k3(logp, ref_logp), logp, ref_logp)


def _with_k2_gradient(value: Elementwise, logp: Elementwise, ref_logp: Elementwise) -> Elementwise:
    slope = k2(logp, ref_logp)
    return slope + jax.lax.stop_gradient(value - slope)


def importance_weighted_k1(logp: Elementwise, ref_logp: Elementwise, old_logp: Elementwise) -> Elementwise:
    """(π/π_old)·d with the ratio differentiated: value and gradient right off-policy too."""
    return importance_ratio(logp, old_logp) * k1(logp, ref_logp)


def importance_weighted_k2(logp: Elementwise, ref_logp: Elementwise, old_logp: Elementwise) -> Elementwise:
    """(π/π_old)·d²/2 with the ratio held constant: gradient right off-policy too; the value is biased as k2's is."""
    return jax.lax.stop_gradient(importance_ratio(logp, old_logp)) * k2(logp, ref_logp)


def importance_weighted_k3(logp: Elementwise, ref_logp: Elementwise, old_logp: Elementwise) -> Elementwise:
    """(π/π_old)·k3 with the ratio differentiated: value and gradient right off-policy too (arXiv:2512.02556)."""
    return importance_ratio(logp, old_logp) * k3(logp, ref_logp)


# ------------------------------------------------------------------------------------------------------------- exact


def categorical_kl(logits: Logits, ref_logits: Logits) -> Float[Array, "*N"]:
    """KL(p ‖ q) = Σ_v p (log p - log q), p = softmax(logits), in nats. 0 where p = 0; inf where q = 0 < p."""
    logp, p = _log_softmax(logits)
    log_q, _ = _log_softmax(ref_logits)
    inside = p > 0  # a difference of two -inf is NaN, and so is its gradient
    difference = jnp.where(inside, logp, 0.0) - jnp.where(inside, log_q, 0.0)
    return (p * difference).sum(axis=-1)


def cross_entropy(logits: Logits, ref_logits: Logits) -> Float[Array, "*N"]:
    """H(p, q) = -Σ_v p log q = H(p) + KL(p ‖ q), p = softmax(logits), in nats; inf where q = 0 < p."""
    _, p = _log_softmax(logits)
    log_q, _ = _log_softmax(ref_logits)
    return -(p * jnp.where(p > 0, log_q, 0.0)).sum(axis=-1)


def _log_softmax(logits: Logits) -> tuple[Logits, Logits]:
    """log p and p, in float32 or better."""
    logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    return logp, jnp.exp(logp)


def gaussian_kl(mean: Elementwise, std: Elementwise, ref_mean: Elementwise, ref_std: Elementwise) -> Elementwise:
    """KL(N(μ, σ²) ‖ N(μ_ref, σ_ref²)) = log(σ_ref/σ) + (σ² + (μ - μ_ref)²)/(2σ_ref²) - ½, of each dimension alone.

    Independent dimensions add up.
    """
    return jnp.log(ref_std / std) + (std**2 + (mean - ref_mean) ** 2) / (2.0 * ref_std**2) - 0.5


def gaussian_entropy(std: Elementwise) -> Elementwise:
    """H(N(μ, σ²)) = ½ log(2πe σ²) of each dimension alone, in nats; that of a categorical is `logprobs.entropy`."""
    return jnp.log(std) + 0.5 * (1.0 + jnp.log(2.0 * jnp.pi))
