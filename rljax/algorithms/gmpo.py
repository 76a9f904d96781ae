"""GMPO: the geometric mean of an answer's clipped ratios (arXiv:2507.20673).

    d_t = min(log ρ_t, ε_high) where Â > 0, max(log ρ_t, -ε_low) else        L = -(1/N⁺) Σ_i Â_i exp((1/n_i) Σ_t d_it)

Clips are in log space and one-sided, as PPO's are. The geometric mean is less moved by a single token's ratio than
GRPO's arithmetic one. Â is GRPO's, constant over an answer.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_logp
from rljax.ops.ratios import bounded_exp
from rljax.ops.sequences import sequence_mean as mean_over_sequence
from rljax.ops.weights import sequence_mean
from rljax.types import Algorithm


def gmpo(low: float = 0.4, high: float = 0.4) -> Algorithm:
    """GMPO. `low`, `high`: bounds of the log ratio."""

    def loss(output, batch):
        mean = lambda x: mean_over_sequence(x, batch.mask, batch.traj.segments)  # noqa: E731
        log_ratio, advantages = output.logp - old_logp(batch.traj), stop_gradient(mean(batch.advantages))
        positive, negative = advantages > 0, advantages < 0
        clipped = (positive & (log_ratio > high)) | (negative & (log_ratio < -low))
        bounded = jnp.where(positive, jnp.minimum(log_ratio, high), log_ratio)
        bounded = jnp.where(negative, jnp.maximum(log_ratio, -low), bounded)
        terms = -advantages * bounded_exp(mean(bounded))
        return terms, {"clip_fraction": clipped.astype(terms.dtype)}

    return Algorithm(credit=group_relative(), loss=loss, weights=sequence_mean)
