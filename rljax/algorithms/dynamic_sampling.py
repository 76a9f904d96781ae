"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): learn only from prompts whose answers differ in reward.

A group of equal rewards has advantage 0 and adds nothing but cost. The paper draws until the batch is full; here more
prompts are drawn than are kept, so that shapes stay fixed, and the groups that teach something are kept first.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_rewards
from rljax.ops.groups import zero_std
from rljax.types import Trajectory


def dynamic_sampling(traj: Trajectory, rows: int) -> Trajectory:
    """The first `rows` rows of `traj` once whole groups are sorted: unequal rewards first, then by group id.

    Groups must be of one size that divides `rows`. Report rewards and lengths of the trajectory before: this one is a
    choice.
    """
    reward, valid = outcome_rewards(traj)
    kept = jnp.lexsort((traj.group, zero_std(reward, traj.group, valid)))[:rows]
    return jax.tree.map(lambda x: x[kept], traj)
