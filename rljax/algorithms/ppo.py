"""PPO with a critic (arXiv:1707.06347), as RLHF uses it (arXiv:1909.08593).

    Â = whiten(GAE(r, V_old; γ, λ))        R̂ = GAE + V_old
    L = token-mean of  max(-ρÂ, -clip(ρ) Â) + c_v ½ max((V - R̂)², (V_old + clip(V - V_old) - R̂)²)

V_old are the critic's values when the rollout was scored; they stay fixed over the epochs. Advantages are whitened over
the whole rollout batch, the targets R̂ are not. A truncated episode bootstraps from `final_values`; where nobody filled
them (text), an answer cut by its length counts as ended. Defaults are those of text: γ = 1, λ = 0.95.
"""

import jax.numpy as jnp

from rljax.algorithms.credit import episode_rewards, old_logp
from rljax.ops import losses
from rljax.ops.returns import gae
from rljax.ops.statistics import whiten
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch


def ppo(
    low: float = 0.2,
    high: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_coefficient: float = 0.5,
    value_clip: float = 0.2,
) -> Algorithm:
    """PPO-clip with generalised advantage estimation and a clipped value loss."""

    def credit(traj, coefficients):
        _, judged = episode_rewards(traj)
        mask = traj.mask & judged[:, None]
        rewards = jnp.where(mask, traj.rewards, 0.0)
        cut = None if traj.final_values is None else traj.truncated
        advantages = gae(rewards, traj.values, mask, gamma, lam, traj.terminated, cut, traj.final_values)
        returns = jnp.where(mask, advantages + traj.values[:, :-1], 0.0)
        advantages = whiten(advantages, mask)
        return Batch(traj=traj, advantages=advantages, mask=mask, returns=returns, coefficients=coefficients)

    def loss(output, batch):
        old = old_logp(batch.traj)
        policy_terms = losses.clipped_surrogate(output.logp, old, batch.advantages, low, high)
        value_terms = losses.clipped_value_loss(output.values, batch.traj.values[:, :-1], batch.returns, value_clip)
        metrics = {
            "clip_fraction": losses.clipped_fraction(output.logp, old, batch.advantages, low, high),
            "policy_loss": policy_terms,
            "value_loss": value_terms,
        }
        return policy_terms + value_coefficient * value_terms, metrics

    return Algorithm(credit=credit, loss=loss, weights=token_mean, needs=("values",))
