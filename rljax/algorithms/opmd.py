"""OPMD: online policy mirror descent with the mean reward as baseline (Kimi k1.5, arXiv:2501.12599, eq. 3).

    L = (1/N⁺) Σ_i [-(R_i - mean_group R) S_i + ½ τ S_i²]        S_i = Σ_t log π(a_it | s_it)/π_old(a_it | s_it)

π_old is the policy that the iteration started from. The optimum of the rewards less τ KL(π ‖ π_old) has τ S_i = R_i - τ
log Z; L has the gradient of the squared difference of the two sides over 2τ, with mean_group R for τ log Z. The paper
gives no τ: the default is that of OpenKimi, which implements it again. Left out: the optimizer is not reset after an
iteration. The paper's length penalty is a wrapper: `group_length_reward(opmd())`.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import sequence_product
from rljax.ops.sequences import sequence_lengths
from rljax.ops.weights import seq_mean_token_sum
from rljax.types import Algorithm


def opmd(tau: float = 0.01) -> Algorithm:
    """Kimi k1.5's mirror descent. `tau`: strength of the pull to the old policy."""

    def loss(output, batch):
        log_ratio = output.logp - old_policy_logp(batch.traj)
        total = sequence_product(log_ratio, batch.mask, batch.traj.segments)
        length = sequence_lengths(batch.mask, batch.traj.segments)
        penalty = 0.5 * total**2 / jnp.maximum(length, 1.0)  # of the sequence, in equal parts on its decisions
        return -batch.advantages * log_ratio + tau * penalty, {"old_policy_penalty": penalty}

    return Algorithm(
        credit=group_relative(None), loss=loss, weights=seq_mean_token_sum, group_signal=rewards_differ, least_group=2
    )
