"""VAPO: a critic for long chains of thought (arXiv:2504.05118).

    λ_i = max(0, 1 - 1/(α n_i))  for the actor's GAE, α = 0.05        λ = 1 for the critic's targets
    L = token-mean of  PPO's clip-higher terms of whitened Â + c_v ½ (V - R̂)²

The longer the answer, the further the actor looks; the critic always learns full returns. The paper adds 0.1 times the
likelihood of right answers: `with_positive_nll(vapo(), 0.1)`. Left out: pretraining the critic on returns.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.ppo import ppo
from rljax.ops.returns import fold_ends, gae, lambda_returns
from rljax.ops.statistics import whiten
from rljax.types import Algorithm, Batch


def vapo(low: float = 0.2, high: float = 0.28, alpha: float = 0.05, value_coefficient: float = 0.5) -> Algorithm:
    """VAPO."""

    def credit(traj, coefficients):
        require(traj, "values")
        rewards, mask = decision_rewards(traj)
        length = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(rewards.dtype)
        lam = jnp.broadcast_to(jnp.maximum(0.0, 1.0 - 1.0 / (alpha * length)), mask.shape)
        cut = None if traj.final_values is None else traj.truncated
        rewards, gamma = fold_ends(rewards, mask, 1.0, traj.terminated, cut, traj.final_values)
        advantages = whiten(gae(rewards, traj.values, mask, gamma, lam), mask)
        returns = lambda_returns(rewards, traj.values, mask, gamma, 1.0)
        return Batch(traj, advantages, mask, returns=returns, coefficients=coefficients)

    return ppo(low, high, value_coefficient=value_coefficient, value_clip=None)._replace(credit=credit)
