"""OPO: exactly on-policy REINFORCE with the length-weighted optimal baseline (arXiv:2505.23585).

    Â_i = R_i - Σ_j n_j R_j / Σ_j n_j        over the group        L = -(1/N⁺) Σ_i Σ_t Â_i log π

The variance-optimal baseline weighs each answer by its squared score norm, for which its length n stands. No ratio, no
clip, no KL, no entropy term: one update per rollout.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.algorithms.reinforce import reinforce
from rljax.ops import groups
from rljax.types import Algorithm


def opo() -> Algorithm:
    """OPO."""

    def credit(traj, coefficients):
        require(traj, "group")
        rewards, valid = outcome_rewards(traj)
        length = jnp.where(valid, traj.mask.sum(axis=1), 0).astype(rewards.dtype)
        total = groups.group_sum(length, traj.group)
        baseline = groups.group_sum(length * rewards, traj.group) / jnp.maximum(total, 1.0)
        return outcome_batch(traj, rewards - baseline, valid, coefficients)

    return reinforce()._replace(credit=credit)
