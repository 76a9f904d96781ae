"""Off-policy policy gradients: plain importance weights, and V-trace with a critic.

    off_policy_pg    L = -(1/N⁺) Σ_i Σ_t sg(min(w, cap)) (R_i - b_i) log π       w = π/μ by a level of `ops.ratios`
    vtrace           L = token-mean of  -Ψ log π + c_v ½ (V - v)²                v, Ψ: IMPALA, arXiv:1802.01561

μ is the behavior policy (`traj.logp`). off_policy_pg uses the ratio of the policy being trained, at every update; the
product over the completion makes it unbiased. V-trace takes π from `traj.old_logp`, the trainer's own recomputation;
v and Ψ are those of `ops.returns.vtrace_returns`.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import decision_rewards, episode_ends, require
from rljax.algorithms.reinforce import BaselineFn, leave_one_out_baseline, reinforce
from rljax.ops import losses
from rljax.ops.ratios import RatioLevel, bounded_exp, importance_ratio, sequence_product, truncate_weights
from rljax.ops.returns import fold_ends, vtrace_returns
from rljax.ops.shapes import Scalar
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch


def off_policy_pg(
    level: RatioLevel = sequence_product, cap: float = float("inf"), baseline: BaselineFn = leave_one_out_baseline
) -> Algorithm:
    """REINFORCE from another policy's completions."""

    def loss(output, batch):
        log_ratio = stop_gradient(output.logp) - batch.traj.logp
        weight = truncate_weights(bounded_exp(level(log_ratio, batch.mask, batch.traj.segments)), cap)
        return losses.policy_gradient(output.logp, weight * batch.advantages), {"importance": weight}

    return reinforce(baseline)._replace(loss=loss, one_update=False, off_policy="itself")


def vtrace(
    gamma: Scalar = 1.0,
    lam: Scalar = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    policy_rho_bar: float = 1.0,
    value_coefficient: float = 0.5,
) -> Algorithm:
    """IMPALA's actor-critic."""

    def credit(traj, coefficients):
        require(traj, "values", "old_logp")
        rewards, mask = decision_rewards(traj)
        ratio = importance_ratio(jnp.where(mask, traj.old_logp, 0.0), jnp.where(mask, traj.logp, 0.0))
        rewards, discount = fold_ends(rewards, mask, gamma, **episode_ends(traj))
        targets, advantages = vtrace_returns(
            rewards, traj.values, ratio, mask, discount, lam, rho_bar, c_bar, policy_rho_bar
        )
        return Batch(traj, advantages, mask, returns=targets, coefficients=coefficients)

    def loss(output, batch):
        policy_terms = losses.policy_gradient(output.logp, batch.advantages)
        value_terms = losses.value_loss(output.values, batch.returns)
        metrics = {"policy_loss": policy_terms, "value_loss": value_terms}
        return policy_terms + value_coefficient * value_terms, metrics

    needs = ("values", "old_logp")
    return Algorithm(credit, loss, token_mean, needs, one_update=True, off_policy="itself")
