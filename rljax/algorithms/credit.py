"""What every `credit` begins with: whole-episode rewards, and the batch made of advantages."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import returns
from rljax.types import Batch, Trajectory, check


def episode_rewards(traj: Trajectory) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`ops.returns.episode_rewards` of a trajectory, whose shapes it checks."""
    check(traj)
    return returns.episode_rewards(traj.rewards, traj.mask)


def outcome_batch(traj: Trajectory, advantages: Float[Array, " B"], judged: Bool[Array, " B"], coefficients) -> Batch:
    """A batch in which every decision of a row is credited with the row's advantage. Rows not judged leave the mask."""
    mask = traj.mask & judged[:, None]
    spread = jnp.where(mask, advantages[:, None], 0.0)
    return Batch(traj=traj, advantages=spread, mask=mask, coefficients=coefficients)


def old_logp(traj: Trajectory) -> Float[Array, "B T"]:
    """The policy that ratios are taken against: the trainer's recomputation, or else the sampler's own log-probs."""
    return traj.logp if traj.old_logp is None else traj.old_logp
