"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): learn only from prompts whose completions differ in reward.

A group of equal rewards has advantage 0 and adds nothing but cost, in a method that compares the completions of a
prompt. The paper samples until the batch is full; here more prompts are sampled than are kept, so that shapes stay
fixed, and the groups that teach something are kept first. Which these are the method says (`Algorithm.group_signal`):
for GDPO groups that differ in any component. A method that learns from every completion has no such groups, and to
select its prompts by their outcome would change what it maximizes.

The rewards are those of the verifiers, before a wrapper adds penalties of length or KL: the paper, too, asks for
different accuracies.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import require, rewards_differ
from rljax.types import Algorithm, SignalFn, Trajectory


def dynamic_sampling(traj: Trajectory, rows: int, group_signal: SignalFn = rewards_differ) -> Trajectory:
    """The first `rows` rows of `traj` once whole groups are sorted: those with a signal first, then by group id.

    Groups must be of one size that divides `rows`. Report rewards and lengths of the trajectory before: this one is a
    selection.
    """
    require(traj, "group")
    kept = jnp.lexsort((traj.group, ~group_signal(traj)))[:rows]
    return jax.tree.map(lambda x: x[kept], traj)


def filter_groups(algorithm: Algorithm) -> Algorithm:
    """Takes groups without a signal out of the batch: out of every sum, of its divisors, and of the KL term.

    Without it such groups have advantage 0 and still count in divisors and in statistics of the batch, as in TRL and
    verl. With it their rows are rows without a reward, and the update is that of the other groups alone. Apply it after
    all other wrappers: the rewards are then those of the verifiers. Raises ValueError for a method that learns from
    every completion.
    """
    signal = algorithm.group_signal
    if signal is None:
        raise ValueError("filter_groups wants a method that compares completions of a prompt; this one learns from all")

    def credit(traj, coefficients):
        kept = signal(traj)[:, None]

        def without_others(values):
            return None if values is None else jnp.where(kept, values, jnp.nan)

        known = traj.replace(rewards=without_others(traj.rewards), scores=without_others(traj.scores))
        batch = algorithm.credit(known, coefficients)
        rewards = jnp.where(kept, batch.traj.rewards, traj.rewards)  # of every row again, for the report
        return batch.replace(traj=batch.traj.replace(rewards=rewards, scores=traj.scores), mask=batch.mask & kept)

    return algorithm._replace(credit=credit)
