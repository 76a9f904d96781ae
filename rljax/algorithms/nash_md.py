"""Nash-MD: a policy that is preferred to a mixture of itself and the reference (arXiv:2312.00886, Nash-MD-PG).

    L = -(1/N⁺) Σ_i sg(P(y_i ≻ y'_i) - ½ - τ log π(y_i)/π_ref(y_i)) log π(y_i)        y ~ π,  y' ~ π^{1-β} π_ref^β

The reward on a completion's last token is P(y ≻ y'), the probability with which it is preferred to one completion y' of
the mixture: of a preference model, or σ(r(y) - r(y')). `models.mixtures.geometric_mixture` samples y', token by token.
β = 0 is self-play; β = 1 plays against the reference.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import from_rewards, outcome_rewards
from rljax.ops import losses
from rljax.ops.kl import k1
from rljax.ops.ratios import sequence_product
from rljax.ops.shapes import PerToken
from rljax.ops.shaping import at_last_decision
from rljax.ops.weights import seq_mean_token_sum
from rljax.types import Algorithm, Trajectory


def preference_above_half(preference, group, valid):
    """P - ½: ½ is what a completion gets against its equal."""
    return jnp.where(valid, preference - 0.5, 0.0)


def preference_over(traj: Trajectory, other: Trajectory) -> PerToken:
    """P(y ≻ y') = σ(r(y) - r(y')) on the last decision of each row of `traj`: row i of both continues the same prompt.

    NaN where one of the two has no valid reward, or no decision.
    """
    rewards, valid = outcome_rewards(traj)
    other_rewards, other_valid = outcome_rewards(other)
    preference = jax.nn.sigmoid(rewards - other_rewards)
    return at_last_decision(jnp.where(valid & other_valid, preference, jnp.nan), traj.mask)


def nash_md(tau: float = 0.1) -> Algorithm:
    """Nash-MD-PG. `tau`: τ, the strength of the KL to the reference."""

    def loss(output, batch):
        log_ratio = k1(output.logp, batch.traj.ref_logp)
        completion_log_ratio = sequence_product(log_ratio, batch.mask, batch.traj.segments)
        payoff = batch.advantages - tau * stop_gradient(completion_log_ratio)
        return losses.policy_gradient(output.logp, payoff), {"kl": log_ratio}

    credit = from_rewards(preference_above_half)
    return Algorithm(credit, loss, weights=seq_mean_token_sum, needs=("ref_logp",), one_update=True)
