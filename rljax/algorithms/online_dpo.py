"""Online DPO (arXiv:2402.04792): the policy's own completions, scored and paired, then any objective over `Pairs`.

online_pairs(traj, num_generations=2) -> Pairs -> dpo(policy)
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_rewards, require, rewards_differ
from rljax.types import Pairs, Trajectory


def online_pairs(traj: Trajectory, num_generations: int = 2, ties: bool = False) -> Pairs:
    """The best completion of each prompt against its worst one: B/num_generations pairs, ordered by group id.

    Of equal best completions the first is chosen, of equal worst ones the last is rejected. Rows that are not valid are
    neither. A prompt with fewer than two valid rows, or whose valid rows are equally good, gives a pair without tokens,
    which weighs nothing.

    Args:
      traj: a rollout whose groups all have `num_generations` rows, in any order.
      ties: equally good rows make a pair too, the first chosen and the last rejected, as in TRL.

    Raises ValueError where `num_generations` does not divide the rows.
    """
    require(traj, "group")
    rewards, valid = outcome_rewards(traj)
    if rewards.shape[0] % num_generations:
        raise ValueError(f"{rewards.shape[0]} rows are not groups of {num_generations} completions")
    rows = jnp.argsort(traj.group, stable=True).reshape(-1, num_generations)
    rewards = rewards[rows]
    valid = valid[rows]
    best = jnp.where(valid, rewards, -jnp.inf).argmax(axis=1)
    worst = num_generations - 1 - jnp.where(valid, rewards, jnp.inf)[:, ::-1].argmin(axis=1)
    comparable = valid.sum(axis=1) >= 2
    if not ties:
        comparable &= rewards_differ(traj)[rows[:, 0]]

    def select(index):
        selected = jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]
        side = jax.tree.map(lambda x: x[selected], traj)
        return side.replace(mask=side.mask & comparable[:, None])

    return Pairs(chosen=select(best), rejected=select(worst))
