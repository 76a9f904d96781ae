"""Reward shaping: where a reward is placed, and what is added to it, before advantages are computed.

A NaN reward means that a verifier failed, and stays NaN. Masked columns may hold garbage; results are 0 there.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from rljax.ops import groups
from rljax.ops.kl import KLEstimator, k1
from rljax.ops.returns import DiscountFactors, fold_ends, td_errors
from rljax.ops.sequences import last_decision, sequence_mean
from rljax.ops.shapes import PerRow, PerToken, Scalar, TokenMask

Lengths = int | Int[Array, "*N"] | Float[Array, "*N"]


def at_last_decision(outcome: PerRow, mask: TokenMask) -> PerToken:
    """The outcome reward of each row on its last decision, wherever the padding is; 0 elsewhere. A row without
    decisions loses it.
    """
    return jnp.where(last_decision(mask), outcome[:, None], 0.0)


def step_numbers(step_ends: Bool[Array, "B T"], mask: TokenMask) -> Int[Array, "B T"]:
    """The index of the reasoning step of each decision, from 0; an end belongs to its step. Ends at masked columns are
    ignored.
    """
    ends = (step_ends & mask).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def step_starts(step_ends: Bool[Array, "B T"], mask: TokenMask) -> Bool[Array, "B T"]:
    """True at the first decision of each reasoning step, that after the last end included."""
    count = jnp.cumsum(mask, axis=1)
    completed = jax.lax.cummax(jnp.where(step_ends & mask, count, 0), axis=1)  # decisions of completed steps
    return mask & (count - jnp.pad(completed[:, :-1], ((0, 0), (1, 0))) == 1)


def spread_over_steps(rewards: PerToken, step_ends: Bool[Array, "B T"], mask: TokenMask) -> PerToken:
    """A step's reward in equal parts on its decisions: Σ_step r / n_step. What follows the last end is a step too."""
    return jnp.where(mask, sequence_mean(rewards, mask, step_numbers(step_ends, mask)), 0.0)


def soft_overlong_punishment(
    lengths: Int[Array, "*N"] | Float[Array, "*N"], max_completion_length: int, cache: int
) -> Float[Array, "*N"]:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), to be added to the reward.

        0 up to L_max - L_cache        ((L_max - L_cache) - n) / L_cache up to L_max        -1 beyond

    `cache` 0 punishes only completions longer than `max_completion_length`.
    """
    room = (max_completion_length - cache - lengths).astype(float)
    return jnp.clip(room / max(cache, 1), -1.0, 0.0)


def exact_length_reward(
    rewards: Float[Array, "*N"], lengths: Lengths, target: Lengths, alpha: Scalar = 3e-4
) -> Float[Array, "*N"]:
    """R - α |n_target - n|: as long as the prompt asks for (LCPO-Exact of L1, arXiv:2503.04697, eq. 1)."""
    return rewards - alpha * jnp.abs(target - lengths)


def max_length_reward(
    rewards: Float[Array, "*N"], lengths: Lengths, target: Lengths, alpha: Scalar = 3e-4, delta: Scalar = 0.5
) -> Float[Array, "*N"]:
    """R · clip(α (n_target - n) + δ, 0, 1): at most as long as the prompt asks for, δ of the reward at the target
    itself (LCPO-Max of L1, arXiv:2503.04697, eq. 2). R is 0 for an incorrect completion.
    """
    return rewards * jnp.clip(alpha * (target - lengths) + delta, 0.0, 1.0)


def relative_length_reward(
    correct: Bool[Array, " B"], lengths: Lengths, group: Int[Array, " B"], valid: Bool[Array, " B"]
) -> PerRow:
    """The length reward of Kimi k1.5 (arXiv:2501.12599, section 2.3.3), to be added with a weight to the reward.

        λ_i = 1/2 - (n_i - n_min)/(n_max - n_min) where correct,  min(0, λ_i) where not        0 where n_max = n_min

    over the valid rows of the group. It favors short correct completions and penalizes long incorrect ones.
    """
    lengths = lengths.astype(float)
    shortest = groups.group_min(lengths, group, valid)
    spread = groups.group_max(lengths, group, valid) - shortest
    reward = 0.5 - (lengths - shortest) / jnp.where(spread > 0, spread, 1.0)
    reward = jnp.where(correct, reward, jnp.minimum(reward, 0.0))
    return jnp.where(valid & (spread > 0), reward, 0.0)


def cosine_reward(
    correct: Bool[Array, "*N"],
    lengths: Lengths,
    max_completion_length: int,
    correct_range: tuple[float, float] = (2.0, 1.0),
    incorrect_range: tuple[float, float] = (-10.0, 0.0),
    exceeded: float = -10.0,
) -> Float[Array, "*N"]:
    """The cosine reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv:2502.03373), for the reward.

        r_L + ½ (r_0 - r_L)(1 + cos(π n/L)) up to L, `exceeded` at n >= L        L: max_completion_length

    Each range is (r_0, r_L), the reward of length 0 and that of length L. With the paper's, the defaults, a correct
    completion should be short and an incorrect one long. The paper also penalizes repeated n-grams of incorrect ones.
    """
    of_correct = _half_cosine(lengths, max_completion_length, *correct_range)
    of_incorrect = _half_cosine(lengths, max_completion_length, *incorrect_range)
    return jnp.where(lengths >= max_completion_length, exceeded, jnp.where(correct, of_correct, of_incorrect))


def _half_cosine(lengths: Lengths, end: int, first: float, last: float) -> Float[Array, "*N"]:
    """From `first` at length 0 to `last` at `end`."""
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * lengths / end))


def truncation_penalty(
    rewards: Float[Array, "*N"], truncated: Bool[Array, "*N"], scale: float = 1.0, offset: float = 0.0
) -> Float[Array, "*N"]:
    """scale · R + offset for completions cut by the length limit, R for the others.

    scale in [0, 1) is OpenRLHF's stop-properly penalty, which *raises* negative rewards; scale 0 replaces R by
    `offset`; scale 1 with a negative offset is the penalty for a missing end of sequence.
    """
    return jnp.where(truncated, scale * rewards + offset, rewards)


def clip_rewards(rewards: Float[Array, "*N"], low: float = -1.0, high: float = 1.0) -> Float[Array, "*N"]:
    """min(max(r, low), high) (Mnih et al. 2015, to ±1)."""
    return jnp.clip(rewards, low, high)


def apply_kl_penalty(
    rewards: PerToken, logp: PerToken, ref_logp: PerToken, mask: TokenMask, beta: Scalar, estimator: KLEstimator = k1
) -> PerToken:
    """r_t - β KL_t at every decision, KL_t by one of `ops.kl` and without gradient (arXiv:1909.08593, 2203.02155).

    `logp` is that of the behavior policy: the penalty is part of the reward, a constant. With k1 the expected return is
    exactly E R - β KL(π ‖ π_ref) of whole completions, including the effect of a token on later ones.
    """
    penalty = beta * estimator(jnp.where(mask, logp, 0.0), jnp.where(mask, ref_logp, 0.0))
    return jnp.where(mask, rewards - stop_gradient(penalty), 0.0)


def potential_shaping(
    potentials: Float[Array, "*B S"],
    mask: Bool[Array, "*B T"],
    gamma: DiscountFactors = 1.0,
    terminated: Bool[Array, "*B T"] | None = None,
    truncated: Bool[Array, "*B T"] | None = None,
    final_potentials: Float[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """F_t = γ Φ(s_{t+1}) - Φ(s_t), to be added to the rewards: the order of policies by return is unchanged (Ng et al.
    1999).

    This needs Φ = 0 in terminal states: it is taken as 0 after a `terminated` decision. After a `truncated` one the
    next column is another episode's: Φ(s_{t+1}) is then `final_potentials`, that of the last observation. S = T + 1:
    potentials[..., T] is Φ after the last decision, as in `returns`. Raises ValueError for `truncated` without
    `final_potentials` (`returns.fold_ends`).
    """
    nothing = jnp.zeros_like(potentials[..., :-1])
    rewards, gamma = fold_ends(nothing, mask, gamma, terminated, truncated, final_potentials)
    return td_errors(rewards, potentials, mask, gamma)
