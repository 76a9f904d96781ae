"""What every `credit` begins with: whole-episode rewards, and the batch made of advantages."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import groups, returns
from rljax.ops.ratios import importance_ratio
from rljax.types import Batch, PolicyOutput, Trajectory, check_shapes


def require(traj: Trajectory, *fields: str) -> None:
    """Raise ValueError, naming it, for a field that the algorithm needs and nobody has filled."""
    for name in fields:
        if getattr(traj, name) is None:
            raise ValueError(f"this algorithm needs Trajectory.{name}, which nobody has filled")


def outcome_rewards(traj: Trajectory) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`ops.returns.episode_rewards` of a trajectory, whose shapes it checks."""
    require(traj, "rewards")
    check_shapes(traj)
    return returns.episode_rewards(traj.rewards, traj.mask)


def outcome_batch(traj: Trajectory, advantages: Float[Array, " B"], valid: Bool[Array, " B"], coefficients) -> Batch:
    """A batch in which every decision of a row is credited with the row's advantage. Rows not judged leave the mask."""
    mask = traj.mask & valid[:, None]
    spread = jnp.where(mask, advantages[:, None], 0.0)
    return Batch(traj=traj, advantages=spread, mask=mask, coefficients=coefficients)


def from_rewards(advantage: Callable, *needed: str) -> Callable:
    """credit: every decision of row i gets advantage(rewards [B], group [B], judged [B])[i]. `needed`: checked."""

    def credit(traj, coefficients):
        require(traj, *needed)
        rewards, valid = outcome_rewards(traj)
        return outcome_batch(traj, advantage(rewards, traj.group, valid), valid, coefficients)

    return credit


def group_relative(std_epsilon: float | None = 1e-6) -> Callable:
    """credit of GRPO: (R_i - mean)/(std + ε) over the judged rows of the group. None: no division (Dr.GRPO)."""
    if std_epsilon is None:
        return from_rewards(groups.center, "group")

    def advantage(rewards, group, valid):
        return groups.standardize(rewards, group, valid, std_epsilon)

    return from_rewards(advantage, "group")


def decision_rewards(traj: Trajectory) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Rewards of single decisions, 0 elsewhere, and the mask without rows that were not judged."""
    _, valid = outcome_rewards(traj)
    mask = traj.mask & valid[:, None]
    return jnp.where(mask, traj.rewards, 0.0), mask


def old_logp(traj: Trajectory) -> Float[Array, "B T"]:
    """The policy that ratios are taken against: the trainer's recomputation, or else the sampler's own log-probs."""
    return traj.logp if traj.old_logp is None else traj.old_logp


def ratio_to_old(output: PolicyOutput, batch: Batch) -> Float[Array, "B T"]:
    """ρ = π/π_old of each decision."""
    return importance_ratio(output.logp, old_logp(batch.traj))
