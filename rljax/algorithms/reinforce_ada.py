"""Reinforce-Ada: sample until a prompt gives a signal, learn from a balanced few (arXiv:2510.04996, from its abstract).

More completions are sampled per prompt than are learned from. `balanced_subsample` keeps `kept` of each group, correct
and incorrect ones in equal parts as far as there are enough of both; `reinforce_ada` compares them with the mean of
*all* that were sampled:

    Â_i = R_i - mean over everything sampled for the prompt        L = GRPO's terms, token mean

The mean is of the whole pool, not of the rows kept, and there is no division by a standard deviation: r_i - mean, as
the authors' repository states it. Its code can divide as well (verl's `norm_adv_by_std_in_grpo`), by the deviation of
the whole pool; left out. It is of the rewards before a wrapper adds a KL or a penalty to those of the rows kept: Â is
then lower by its mean, which adds variance and no bias.

The paper samples in rounds and leaves a prompt when it has seen enough: one correct completion ("-pos"), or half of
`kept` correct and the rest incorrect ("-balance"). Both keep completions in the same balanced way. Here all are sampled
at once, in fixed shapes, so that the two are one.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.algorithms.dapo import dapo
from rljax.ops import groups
from rljax.types import Algorithm, Trajectory


def balanced_subsample(traj: Trajectory, drawn: int, kept: int) -> Trajectory:
    """`kept` rows of every group of `drawn`, with `baseline` = mean reward of all the group's rows.

    A row is positive if its reward is above that mean. Rows that are not valid are taken last. All groups have `drawn`
    rows. Raises ValueError if these numbers do not fit.
    """
    if traj.mask.shape[0] % drawn or kept > drawn:
        raise ValueError(f"{traj.mask.shape[0]} rows are not groups of {drawn}, or hold no {kept} to keep")
    require(traj, "group")
    rewards, valid = outcome_rewards(traj)
    mean = groups.group_mean(rewards, traj.group, valid)

    by_group = jnp.argsort(traj.group, stable=True).reshape(-1, drawn)
    valid_by_group = valid[by_group]
    positive = ((rewards > mean) & valid)[by_group]
    negative = valid_by_group & ~positive
    rank = jnp.where(positive, jnp.cumsum(positive, axis=1), jnp.cumsum(negative, axis=1))  # 1, 2 ... of its kind
    order = jnp.argsort(jnp.where(valid_by_group, rank, drawn + 1), axis=1, stable=True)[:, :kept]
    rows = jnp.take_along_axis(by_group, order, axis=1).ravel()
    return jax.tree.map(lambda x: x[rows], traj.replace(baseline=mean))


def reinforce_ada(low: float = 0.2, high: float = 0.28) -> Algorithm:
    """DAPO's loss with the baseline of everything sampled."""

    def credit(traj, coefficients):
        require(traj, "baseline")
        rewards, valid = outcome_rewards(traj)
        return outcome_batch(traj, rewards - traj.baseline, valid, coefficients)

    return dapo(low, high)._replace(credit=credit, group_signal=None, least_group=1, needs=("baseline",))
