"""Reinforce-Ada: sample until a prompt gives a signal, learn from a balanced few (arXiv:2510.04996, from its abstract).

More answers are drawn per prompt than are learnt from. `balanced` keeps `kept` of each group, right and wrong ones in
equal parts as far as there are enough of both; `reinforce_ada` compares them with the mean of *all* that were drawn:

    Â_i = R_i - mean over everything drawn for the prompt        L = GRPO's terms, token mean

The paper draws in rounds until enough are seen; here all are drawn at once, in fixed shapes.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.algorithms.dapo import dapo
from rljax.ops import groups
from rljax.types import Algorithm, Trajectory


def balanced_subsample(traj: Trajectory, drawn: int, kept: int) -> Trajectory:
    """`kept` rows of every group of `drawn`, with `baseline` = mean reward of all the group's rows.

    A row is right where its reward is above that mean. Rows that were not judged are taken last. All groups have
    `drawn` rows. Raises ValueError where that cannot be.
    """
    if traj.mask.shape[0] % drawn or kept > drawn:
        raise ValueError(f"{traj.mask.shape[0]} rows are not groups of {drawn}, or hold no {kept} to keep")
    reward, valid = outcome_rewards(traj)
    mean = groups.group_mean(reward, traj.group, valid)
    by_group = jnp.argsort(traj.group, stable=True)
    right, valid = ((reward > mean) & valid)[by_group].reshape(-1, drawn), valid[by_group].reshape(-1, drawn)
    wrong = valid & ~right
    place = jnp.where(right, jnp.cumsum(right, axis=1), jnp.cumsum(wrong, axis=1))  # first, second ... of its kind
    order = jnp.argsort(jnp.where(valid, place, drawn + 1), axis=1, stable=True)[:, :kept]
    rows = jnp.take_along_axis(by_group.reshape(-1, drawn), order, axis=1).ravel()
    return jax.tree.map(lambda x: x[rows], traj.replace(baseline=mean))


def reinforce_ada(low: float = 0.2, high: float = 0.28) -> Algorithm:
    """DAPO's loss with the baseline of everything drawn."""

    def credit(traj, coefficients):
        require(traj, "baseline")
        rewards, valid = outcome_rewards(traj)
        return outcome_batch(traj, rewards - traj.baseline, valid, coefficients)

    return dapo(low, high)._replace(credit=credit, needs=("baseline",))
