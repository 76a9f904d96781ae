"""Returns and advantages over time.

Time is the last axis; column t is one decision: r_t follows a_t, V_t was seen before it. Columns with mask False
(prompt, tool output, padding) are skipped: what stands to their right reaches the decision to their left unchanged, as
if they were not there. Values at masked columns may be garbage.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar = float | Float[Array, ""]


def _backward(step, carry, columns):
    """Scan the columns from the last to the first. Each is [B T] outside and [B] inside."""
    major = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), columns)
    _, out = jax.lax.scan(step, carry, major, reverse=True)
    return jnp.moveaxis(out, 0, -1)


def episode_rewards(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """R_i = Σ_t r_it over each row's decisions, and whether the row was judged at all.

    A row is not judged if a reward on one of its decisions is NaN, or if it has no decision; its R is 0.
    """
    total = jnp.where(mask, rewards, 0.0).sum(axis=1)
    judged = jnp.isfinite(total) & mask.any(axis=1)
    return jnp.where(judged, total, 0.0), judged


def discounted_returns(
    rewards: Float[Array, "*B T"], mask: Bool[Array, "*B T"], gamma: Scalar = 1.0
) -> Float[Array, "*B T"]:
    """Reward-to-go G_t = r_t + γ G_{t+1} over the unmasked decisions; 0 where masked."""

    def step(following, column):
        reward, valid = column
        here = jnp.where(valid, reward + gamma * following, following)
        return here, jnp.where(valid, here, 0.0)

    return _backward(step, jnp.zeros_like(rewards[..., 0]), (rewards, mask))


def gae(
    rewards: Float[Array, "*B T"],
    values: Float[Array, "*B T+1"],
    mask: Bool[Array, "*B T"],
    gamma: Scalar = 1.0,
    lam: Scalar = 0.95,
    terminated: Bool[Array, "*B T"] | None = None,
    truncated: Bool[Array, "*B T"] | None = None,
    final_values: Float[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        δ_t = r_t + γ V_{t+1} - V_t        Â_t = δ_t + γ λ Â_{t+1}

    V_{t+1} is the value at the next unmasked decision; values[..., T] after the last one (0 for text). A terminated
    decision has no value and no advantage beyond it; a truncated one bootstraps from `final_values` and cuts the sum.
    The targets of the critic are Â + V (the λ-return). Whitening is a separate step (`statistics.whiten`).

    Returns: advantages, 0 where masked. Raises ValueError for `truncated` without `final_values`.
    """
    if truncated is not None and final_values is None:
        raise ValueError("truncated decisions bootstrap: give final_values, V of the observation after each of them")
    never = jnp.zeros_like(mask)
    terminated = never if terminated is None else terminated
    truncated = never if truncated is None else truncated
    final_values = jnp.zeros_like(rewards) if final_values is None else final_values

    def step(carry, column):
        next_value, next_advantage = carry
        reward, value, valid, ended, cut, last_value = column
        bootstrap = jnp.where(ended, 0.0, jnp.where(cut, last_value, next_value))
        further = jnp.where(ended | cut, 0.0, next_advantage)
        advantage = reward + gamma * bootstrap - value + gamma * lam * further
        carry = (jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage))
        return carry, jnp.where(valid, advantage, 0.0)

    start = (values[..., -1], jnp.zeros_like(values[..., -1]))
    return _backward(step, start, (rewards, values[..., :-1], mask, terminated, truncated, final_values))
