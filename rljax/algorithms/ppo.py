"""PPO with a critic (arXiv:1707.06347), as RLHF uses it (arXiv:1909.08593).

    Â = whiten(GAE(r, V_old; γ, λ))        R̂ = GAE + V_old
    L = token-mean of  max(-ρÂ, -clip(ρ) Â) + c_v ½ max((V - R̂)², (V_old + clip(V - V_old) - R̂)²)

V_old are the critic's values when the rollout was annotated; they stay fixed over the epochs. Advantages are whitened
over the whole rollout batch, the targets R̂ are not. A truncated episode bootstraps from `final_values`; if they are
None (text), a completion cut by its length counts as ended. Defaults are those of text: γ = 1, λ = 0.95.

`ppo_penalty` is the paper's other form (eq. 8): -ρÂ + β KL(π_old ‖ π), no clip. β is `coefficients["kl_old"]`, which
`controllers.ppo_penalty_coefficient` changes after each rollout. Leaving the epochs early is `learn(..., stop_kl=...)`.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, episode_ends, old_policy_logp, require
from rljax.ops import losses
from rljax.ops.kl import k3
from rljax.ops.ratios import importance_ratio
from rljax.ops.returns import gae
from rljax.ops.shapes import Scalar
from rljax.ops.statistics import whiten
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch, LossFn


def actor_critic(
    actor: LossFn, gamma: Scalar, lam: Scalar, value_coefficient: float, value_clip: float | None
) -> Algorithm:
    """GAE and a critic added to the actor's loss: (output, batch) -> (terms, metrics)."""

    def credit(traj, coefficients):
        require(traj, "values")
        rewards, mask = decision_rewards(traj)
        advantages = gae(rewards, traj.values, mask, gamma, lam, **episode_ends(traj))
        returns = jnp.where(mask, advantages + traj.values[:, :-1], 0.0)
        return Batch(traj, whiten(advantages, mask), mask, returns=returns, coefficients=coefficients)

    def loss(output, batch):
        policy_terms, metrics = actor(output, batch)
        if value_clip is None:
            value_terms = losses.value_loss(output.values, batch.returns)
        else:
            value_terms = losses.clipped_value_loss(output.values, batch.traj.values[:, :-1], batch.returns, value_clip)
            unclipped = losses.value_loss(output.values, batch.returns)
            metrics = {**metrics, "value_clip_fraction": (value_terms > unclipped).astype(value_terms.dtype)}
        metrics = {**metrics, "policy_loss": policy_terms, "value_loss": value_terms}
        return policy_terms + value_coefficient * value_terms, metrics

    return Algorithm(credit=credit, loss=loss, weights=token_mean, needs=("values",))


def ppo(
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    gamma: Scalar = 1.0,
    lam: Scalar = 0.95,
    value_coefficient: float = 0.5,
    value_clip: float | None = 0.2,
    dual: float | None = None,
) -> Algorithm:
    """PPO-clip. `dual`: bound c of the dual clip (`losses.dual_clip`); `value_clip` None: plain squared error."""

    def actor(output, batch):
        ratio = importance_ratio(output.logp, old_policy_logp(batch.traj))
        terms = losses.clipped_surrogate(ratio, batch.advantages, low, high)
        if dual is not None:
            terms = losses.dual_clip(terms, batch.advantages, dual)
        return terms, losses.clip_metrics(ratio, batch.advantages, low, high, dual)

    return actor_critic(actor, gamma, lam, value_coefficient, value_clip)


def ppo_penalty(
    coefficient: Scalar = 1.0,
    gamma: Scalar = 1.0,
    lam: Scalar = 0.95,
    value_coefficient: float = 0.5,
    value_clip: float | None = 0.2,
) -> Algorithm:
    """PPO with a KL penalty: exact where `PolicyOutput.kl` is given, else k3 of the old policy's samples."""

    def actor(output, batch):
        old_logp = old_policy_logp(batch.traj)
        divergence = k3(old_logp, output.logp) if output.kl is None else output.kl
        beta = batch.coefficients.get("kl_old", coefficient)
        terms = beta * divergence - importance_ratio(output.logp, old_logp) * batch.advantages
        return terms, {"kl_old": divergence}

    return actor_critic(actor, gamma, lam, value_coefficient, value_clip)
