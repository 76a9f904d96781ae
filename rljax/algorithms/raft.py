"""RAFT: reward ranked fine-tuning, or best-of-n fine-tuning (arXiv:2304.06767).

    L = -(1/Σm) Σ_{i best of its group} Σ_t log π(a_it | s_it)        m: the decisions of the best completions

The best completion of each prompt becomes a demonstration, whatever its reward: with rewards of 0 and 1, where many
completions are equally good or bad, `rft` is meant. Of equal best completions the first is kept. The other completions
leave the mask, so that the weights do not count them. Left out: several passes of fine-tuning over one ranked data set.
"""

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.algorithms.reinforce import reinforce
from rljax.ops import groups
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, WeightsFn


def raft(weights: WeightsFn = token_mean) -> Algorithm:
    """Supervised fine-tuning on the best completion of each group."""

    def credit(traj, coefficients):
        require(traj, "group")
        rewards, valid = outcome_rewards(traj)
        kept = groups.first_best(rewards, traj.group, valid)
        return outcome_batch(traj, kept.astype(rewards.dtype), kept, coefficients)

    return reinforce()._replace(credit=credit, group_signal=None, weights=weights)
