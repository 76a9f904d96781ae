"""A*-PO: regression onto the optimal advantage (arXiv:2505.20686).

    V*(x) = β₁ log mean_j exp(r_j/β₁)    over completions of the reference, sampled once before training
    L = (1/N⁺) Σ_i (β₂ log(π(y_i|x)/π_ref(y_i|x)) - (R_i - V*(x)))²

`traj.baseline` holds V*(x) (`optimal_value`). One completion per prompt suffices; there are no group statistics.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.ops.ratios import sequence_product
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm


def optimal_value(rewards: Float[Array, "*P N"], beta: float = 0.5) -> Float[Array, "*P"]:
    """V* = β log mean exp(r/β) over N completions of the reference policy."""
    return beta * (jax.nn.logsumexp(rewards / beta, axis=-1) - jnp.log(rewards.shape[-1]))


def a_star_po(beta: float = 1e-3) -> Algorithm:
    """A*-PO. `beta`: β₂, the strength of the KL in the objective that the regression solves."""

    def credit(traj, coefficients):
        require(traj, "baseline")
        rewards, valid = outcome_rewards(traj)
        valid = valid & jnp.isfinite(traj.baseline)
        return outcome_batch(traj, rewards - jnp.where(valid, traj.baseline, 0.0), valid, coefficients)

    def loss(output, batch):
        log_ratio = sequence_product(output.logp - batch.traj.ref_logp, batch.mask, batch.traj.segments)
        return (beta * log_ratio - batch.advantages) ** 2, {}

    needs = ("ref_logp", "baseline")
    return Algorithm(credit, loss, weights=seq_mean_token_mean, needs=needs, off_policy="itself")
