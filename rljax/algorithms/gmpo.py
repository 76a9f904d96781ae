"""GMPO: the geometric mean of a completion's clipped ratios (arXiv:2507.20673).

    d_t = min(log ρ_t, ε_high) where Â > 0, max(log ρ_t, -ε_low) else        L = -(1/N⁺) Σ_i Â_i exp((1/n_i) Σ_t d_it)

Clips are in log space and one-sided, as PPO's are: `high` bounds log ρ from above where Â > 0, `low` from below where Â
< 0, which is verl's and TRL's meaning. The authors' code clips sgn(Â) log ρ by one number, ±0.4, so that with `low` =
`high` it is the same. The geometric mean is less sensitive to a single token's ratio than GRPO's arithmetic one. Â is
GRPO's, constant over a completion.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import bounded_exp
from rljax.ops.sequences import sequence_mean
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm


def gmpo(low: float = 0.4, high: float = 0.4) -> Algorithm:
    """GMPO. `low`, `high`: bounds of the log ratio."""

    def loss(output, batch):
        mask = batch.mask
        segments = batch.traj.segments
        log_ratio = output.logp - old_policy_logp(batch.traj)
        advantages = stop_gradient(sequence_mean(batch.advantages, mask, segments))
        positive = advantages > 0
        negative = advantages < 0
        clipped = (positive & (log_ratio > high)) | (negative & (log_ratio < -low))
        bounded = jnp.where(positive, jnp.minimum(log_ratio, high), log_ratio)
        bounded = jnp.where(negative, jnp.maximum(log_ratio, -low), bounded)
        terms = -advantages * bounded_exp(sequence_mean(bounded, mask, segments))
        return terms, {"clip_fraction": clipped.astype(terms.dtype)}

    return Algorithm(
        credit=group_relative(), loss=loss, weights=seq_mean_token_mean, group_signal=rewards_differ, least_group=2
    )
