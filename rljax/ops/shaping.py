"""What becomes of a reward before it is credited: where it stands, and what is added to it.

A NaN reward means "not judged" and stays NaN. Masked columns may hold garbage; results are 0 there.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.kl import k1
from rljax.ops.returns import Weights, td_errors
from rljax.ops.sequences import last_decision, sequence_mean

Mask = Bool[Array, "B T"]
Terms = Float[Array, "B T"]


def at_last_decision(outcome: Float[Array, " B"], mask: Mask) -> Terms:
    """An outcome reward on the last decision of its row, wherever the padding is; 0 elsewhere. A row without a decision
    loses it.
    """
    return jnp.where(last_decision(mask), outcome[:, None], 0.0)


def step_numbers(step_ends: Bool[Array, "B T"], mask: Mask) -> Int[Array, "B T"]:
    """Which reasoning step a decision belongs to, from 0; an end is part of its step. Masked columns have no ends."""
    ends = (step_ends & mask).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def spread_over_steps(rewards: Terms, step_ends: Bool[Array, "B T"], mask: Mask) -> Terms:
    """A step's reward in equal parts on its decisions: Σ_step r / n_step. What follows the last end is a step too."""
    return jnp.where(mask, sequence_mean(rewards, mask, step_numbers(step_ends, mask)), 0.0)


def soft_overlong_punishment(
    lengths: Int[Array, "*N"] | Float[Array, "*N"], longest: int, cache: int
) -> Float[Array, "*N"]:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), to be added to the reward.

        0 up to L_max - L_cache        ((L_max - L_cache) - n) / L_cache up to L_max        -1 beyond

    `cache` 0 punishes only what is longer than `longest`.
    """
    room = (longest - cache - lengths).astype(float)
    return jnp.clip(room / max(cache, 1), -1.0, 0.0)


def truncation_penalty(
    rewards: Float[Array, "*N"], truncated: Bool[Array, "*N"], scale: float = 1.0, offset: float = 0.0
) -> Float[Array, "*N"]:
    """scale · R + offset for answers that the length limit cut, R for the others.

    scale in [0, 1) is OpenRLHF's stop-properly penalty, which *raises* negative rewards; scale 0
    puts `offset` in their place; scale 1 with a negative offset is the penalty for a missing end of sequence.
    """
    return jnp.where(truncated, scale * rewards + offset, rewards)


def clip_rewards(rewards: Float[Array, "*N"], low: float = -1.0, high: float = 1.0) -> Float[Array, "*N"]:
    """min(max(r, low), high) (Mnih et al. 2015, to ±1)."""
    return jnp.clip(rewards, low, high)


def apply_kl_penalty(
    rewards: Terms, logp: Terms, ref_logp: Terms, mask: Mask, beta: float | Float[Array, ""], estimator: Callable = k1
) -> Terms:
    """r_t - β KL_t at every decision, KL_t by one of `ops.kl` and without gradient (arXiv:1909.08593, 2203.02155).

    `logp` is that of the policy that acted: the penalty is a fact, part of the reward. With k1 the expected return is
    exactly E R - β KL(π ‖ π_ref) of whole answers, the effect of a token on later ones included. `beta` may be traced.
    """
    penalty = beta * estimator(jnp.where(mask, logp, 0.0), jnp.where(mask, ref_logp, 0.0))
    return jnp.where(mask, rewards - stop_gradient(penalty), 0.0)


def potential_shaping(
    potentials: Float[Array, "*B S"],
    mask: Bool[Array, "*B T"],
    gamma: Weights = 1.0,
    terminated: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """F_t = γ Φ(s_{t+1}) - Φ(s_t), to be added to the rewards: no policy gains on another by it (Ng et al. 1999).

    That holds only if Φ is 0 in terminal states: it is taken as 0 after a `terminated` decision. S = T + 1:
    potentials[..., T] is Φ after the last decision, as in `returns`.
    """
    gamma = gamma if terminated is None else jnp.where(terminated, 0.0, gamma).astype(potentials.dtype)
    return td_errors(jnp.zeros_like(potentials[..., :-1]), potentials, mask, gamma)
