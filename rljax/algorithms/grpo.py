"""GRPO: group relative policy optimisation (DeepSeekMath, arXiv:2402.03300, eq. 3, outcome supervision).

    Â_it = (R_i - mean_group R) / (std_group R + ε)
    L = (1/N⁺) Σ_i (1/n_i) Σ_t max(-ρ_it Â_it, -clip(ρ_it, 1 - low, 1 + high) Â_it)

The paper's KL term is a wrapper: `with_kl(grpo(), 0.04)`. With one update per rollout ρ = 1: the loss is 0 and the
gradient is not. std is unbiased; a group of equal rewards, or of one row, has advantage 0. Left out: process
supervision.

Variants are arguments: `grpo(std_epsilon=None, weights=constant_length(C))` is Dr.GRPO (arXiv:2503.20783);
`grpo(high=0.28, weights=token_mean)` is the loss of DAPO (arXiv:2503.14476).
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.algorithms.credit import episode_rewards, old_logp, outcome_batch
from rljax.ops import groups, losses
from rljax.ops.weights import sequence_mean
from rljax.types import Algorithm


def grpo(
    low: float = 0.2, high: float = 0.2, std_epsilon: float | None = 1e-6, weights: Callable = sequence_mean
) -> Algorithm:
    """GRPO. `std_epsilon` None leaves out the division by the group's standard deviation."""

    def credit(traj, coefficients):
        rewards, judged = episode_rewards(traj)
        advantages = rewards - groups.group_mean(rewards, traj.group, judged)
        if std_epsilon is not None:
            advantages = advantages / (groups.group_std(rewards, traj.group, judged) + std_epsilon)
        return outcome_batch(traj, jnp.where(judged, advantages, 0.0), judged, coefficients)

    def loss(output, batch):
        old = old_logp(batch.traj)
        terms = losses.clipped_surrogate(output.logp, old, batch.advantages, low, high)
        return terms, {"clip_fraction": losses.clipped_fraction(output.logp, old, batch.advantages, low, high)}

    return Algorithm(credit=credit, loss=loss, weights=weights)
