"""Online DPO (arXiv:2402.04792): the policy's own answers, scored and paired, then any objective over `Pairs`.

online_pairs(traj, answers=2) -> Pairs -> dpo(policy)
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_rewards
from rljax.types import Pairs, Trajectory


def online_pairs(traj: Trajectory, answers: int = 2, eos_penalty: float = 0.0) -> Pairs:
    """The best answer of each prompt against its worst one: B/answers pairs, ordered by group id.

    Of equal best answers the first is chosen, of equal worst ones the last is rejected. Answers that could not be
    judged are neither; a prompt with fewer than two others gives a pair without tokens, which weighs nothing.

    Args:
      traj: a rollout whose groups all have `answers` rows, in any order.
      eos_penalty: taken off the reward of an answer that did not terminate, before ranking.

    Raises ValueError where `answers` does not divide the rows.
    """
    rewards, valid = outcome_rewards(traj)
    if rewards.shape[0] % answers:
        raise ValueError(f"{rewards.shape[0]} rows are not groups of {answers} answers")
    if eos_penalty:
        rewards = rewards - eos_penalty * ~(traj.terminated & traj.mask).any(axis=1)
    rows = jnp.argsort(traj.group, stable=True).reshape(-1, answers)
    rewards, valid = rewards[rows], valid[rows]
    best = jnp.where(valid, rewards, -jnp.inf).argmax(axis=1)
    worst = answers - 1 - jnp.where(valid, rewards, jnp.inf)[:, ::-1].argmin(axis=1)
    two = valid.sum(axis=1) >= 2

    def take(place):
        taken = jnp.take_along_axis(rows, place[:, None], axis=1)[:, 0]
        side = jax.tree.map(lambda x: x[taken], traj)
        return side.replace(mask=side.mask & two[:, None])

    return Pairs(chosen=take(best), rejected=take(worst))
