"""Positive and negative sample reinforcement, and both weighted (arXiv:2506.01347).

    psr            L = -(1/N⁺) Σ_{i correct} Σ_t log π
    nsr            L = +(1/N⁺) Σ_{i incorrect} Σ_t log π
    w_reinforce    L = λ L_psr + L_nsr        λ = 0.1 in the paper

A completion is correct if its first score is above `above` (`correct_rows`): verdicts of 0 and 1 mean the same as the
paper's -1 and 1. N⁺ counts all completions, also those without gradient. On-policy the three have the same mean
gradient, but for its scale, that of the probability to be correct; they differ in variance, and in how they change the
policy after several updates.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import correct_rows, outcome_batch
from rljax.algorithms.reinforce import no_baseline, reinforce
from rljax.types import Algorithm


def psr(above: float = 0.0) -> Algorithm:
    """Only correct completions are learned from: they become likelier."""
    return _weighted(1.0, 0.0, above)


def nsr(above: float = 0.0) -> Algorithm:
    """Only incorrect completions are learned from: they become less likely."""
    return _weighted(0.0, 1.0, above)


def w_reinforce(positive: float = 0.1, above: float = 0.0) -> Algorithm:
    """W-REINFORCE. `positive`: λ, the weight of the correct completions."""
    return _weighted(positive, 1.0, above)


def _weighted(positive: float, negative: float, above: float) -> Algorithm:
    """Advantages of `positive` for correct completions, -`negative` for the others."""

    def credit(traj, coefficients):
        correct, valid = correct_rows(traj, above)
        advantages = jnp.where(correct, positive, -negative).astype(traj.rewards.dtype)
        return outcome_batch(traj, advantages, valid, coefficients)

    return reinforce(no_baseline)._replace(credit=credit, reads="correct")
