"""Building blocks of `credit`: rewards of rows and of decisions, ends of episodes, and batches made from advantages."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rljax.ops import groups, returns
from rljax.ops.shapes import PerRow, PerToken, TokenMask
from rljax.types import Batch, CreditFn, Trajectory, check_shapes

GroupIds = Int[Array, " B"] | None
ValidRows = Bool[Array, " B"]  # False: no decision, or a reward that failed
CorrectRows = Bool[Array, " B"]  # a valid row whose first score is high enough
AdvantageFn = Callable[[PerRow, GroupIds, ValidRows], PerRow]  # (rewards, group, valid) -> advantages


def require(traj: Trajectory, *fields: str) -> None:
    """Raise ValueError, naming the field, if a field that the algorithm needs is None."""
    for name in fields:
        if getattr(traj, name) is None:
            raise ValueError(f"this algorithm needs Trajectory.{name}, which is None")


def outcome_rewards(traj: Trajectory) -> tuple[PerRow, ValidRows]:
    """`ops.returns.episode_rewards` of a trajectory whose shapes are checked first."""
    require(traj, "rewards")
    check_shapes(traj)
    return returns.episode_rewards(traj.rewards, traj.mask)


def correct_rows(traj: Trajectory, above: float = 0.0) -> tuple[CorrectRows, ValidRows]:
    """`ops.returns.correct_episodes` of a trajectory: what "correct" means in every algorithm and metric.

    `scores` are read before anything that a wrapper adds to rewards; where there are none, the rewards are.
    """
    require(traj, "rewards")
    check_shapes(traj)
    return returns.correct_episodes(traj.rewards, traj.mask, traj.scores, above)


def decision_rewards(traj: Trajectory) -> tuple[PerToken, TokenMask]:
    """The reward of each decision, 0 elsewhere, and the mask without rows that are not valid."""
    _, valid = outcome_rewards(traj)
    mask = traj.mask & valid[:, None]
    return jnp.where(mask, traj.rewards, 0.0), mask


def episode_ends(traj: Trajectory) -> dict[str, Any]:
    """`terminated`, `truncated` and `final_values`, as the functions of `ops.returns` take them.

    A truncated episode bootstraps from `final_values`; where these are None (text) it counts as ended.
    """
    truncated = None if traj.final_values is None else traj.truncated
    return {"terminated": traj.terminated, "truncated": truncated, "final_values": traj.final_values}


def outcome_batch(traj: Trajectory, advantages: PerRow, valid: ValidRows, coefficients: dict[str, Any]) -> Batch:
    """A batch in which each decision has the advantage of its row. Rows that are not valid leave the mask."""
    mask = traj.mask & valid[:, None]
    spread = jnp.where(mask, advantages[:, None], 0.0)
    return Batch(traj=traj, advantages=spread, mask=mask, coefficients=coefficients)


def from_rewards(advantage: AdvantageFn, *needed: str) -> CreditFn:
    """A credit function that gives each decision of row i advantage(rewards, group, valid)[i]. `needed`: fields that
    are required.
    """

    def credit(traj, coefficients):
        require(traj, *needed)
        rewards, valid = outcome_rewards(traj)
        return outcome_batch(traj, advantage(rewards, traj.group, valid), valid, coefficients)

    return credit


def group_relative(std_epsilon: float | None = 1e-6) -> CreditFn:
    """GRPO's credit: (R_i - mean)/(std + ε) over the valid rows of the group. None: no division (Dr.GRPO)."""
    if std_epsilon is None:
        return from_rewards(groups.center, "group")

    def advantage(rewards, group, valid):
        return groups.standardize(rewards, group, valid, std_epsilon)

    return from_rewards(advantage, "group")


def rewards_differ(traj: Trajectory) -> ValidRows:
    """Rows of groups whose outcome rewards differ, from which a method learns that compares completions of a prompt."""
    require(traj, "group")
    rewards, valid = outcome_rewards(traj)
    return ~groups.zero_std(rewards, traj.group, valid)


def old_policy_logp(traj: Trajectory) -> PerToken:
    """log π_old, which ratios are taken against: the trainer's recomputation, or else the sampler's own log-probs."""
    return traj.logp if traj.old_logp is None else traj.old_logp
