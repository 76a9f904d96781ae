"""Returns and advantages over time.

Time is the last axis; column t is one decision: r_t follows a_t, V_t was seen before it. Columns with mask False
(prompt, tool output, padding) are skipped: what stands to their right reaches the decision to their left unchanged, as
if they were not there. V_{t+1} is the value at the *next unmasked* decision, values[..., T] after the last one (0 for
text, whose last token ends the episode). Masked columns may hold garbage; results are 0 there. Mask None says that all
columns are decisions, which saves time; so does handing over time-major arrays [T B] as `gae(r.T, v.T, None).T`: one
turn cancels the other under jit, and a scan over rows reads memory as it lies (`experiments/benchmarks/returns.py`).

γ and λ are scalars or hold one number a decision [.. T]; both weigh what follows the decision they stand at. γ_t is 0
where decision t ended its episode; `fold_ends` makes such γ and the rewards of truncated episodes.

The policy gradient is E Σ_t ∇log π(a_t | s_t) Ψ_t (Schulman et al. 2016, arXiv:1506.02438, eq. 1). Ψ_t may be

    R(τ), the return of the whole episode              total_return
    Σ_{t' ≥ t} r_t', reward-to-go                      discounted_returns
    reward-to-go less a baseline b(s_t)                discounted_returns - b; b = V(s_t): gae at λ = 1
    Q(s_t, a_t)                                        known, or estimated: n_step_returns, lambda_returns
    A(s_t, a_t) = Q - V                                known, or estimated: n_step_returns - V
    the TD residual r_t + γ V_{t+1} - V_t              td_errors
    Â_t, GAE(γ, λ)                                     gae; off-policy: vtrace(...).advantages

The first three are unbiased; exact Q and A too; the last two where V is the policy's own value (GAE also at λ = 1). At
γ < 1 all leave out the factor γ^t in front of decision t, as everybody does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Terms = Float[Array, "*B T"]
Values = Float[Array, "*B T+1"]
Mask = Bool[Array, "*B T"]
Scalar = float | Float[Array, ""]
Weights = float | Float[Array, ""] | Float[Array, "*B T"]  # γ, λ


def _backward(step, carry, mask, values, *numbers):
    """Scan the decisions from the last to the first: step(carry, V_t, V_{t+1}, *numbers) -> carry, out.

    Arrays are [B T] outside and [B] inside; scalars are the same in all. At a masked column the step sees zeros
    (garbage times a zero cotangent is a NaN gradient), the carry stays as it was, and what comes out is 0. Raises
    ValueError unless values have one column more.
    """
    T = numbers[0].shape[-1]
    if values is not None and values.shape[-1] != T + 1:
        raise ValueError(
            f"values of {values.shape[-1]} columns for {T} decisions; legal: {T + 1}, V after the last too"
        )
    first = lambda x: jnp.moveaxis(x, -1, 0) if jnp.ndim(x) else x  # noqa: E731
    columns = [first(x) if jnp.ndim(x) else None for x in numbers]
    major = None if values is None else first(values)

    def value_at(t):  # a slice of all columns but one would be a copy
        return None if values is None else jax.lax.dynamic_index_in_dim(major, t, keepdims=False)

    def one(state, column):
        (carry, following), (t, valid, row) = state, column
        if mask is None:
            found = (x if c is None else c for x, c in zip(numbers, row, strict=True))
            carry, out = step(carry, value_at(t), value_at(t + 1), *found)
            return (carry, None), out
        keep = lambda new, old: jnp.where(valid, new, old)  # noqa: E731
        found = (x if c is None else keep(c, 0.0) for x, c in zip(numbers, row, strict=True))
        value = None if values is None else keep(value_at(t), 0.0)
        new, out = step(carry, value, following, *found)
        state = jax.tree.map(keep, (new, value), (carry, following))
        return state, jax.tree.map(lambda x: keep(x, 0.0), out)

    start = (carry, None if values is None or mask is None else values[..., -1])
    scanned = (jnp.arange(T), None if mask is None else first(mask), columns)
    (carry, _), out = jax.lax.scan(one, start, scanned, reverse=True)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), out)


def episode_rewards(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """R_i = Σ_t r_it over each row's decisions, and whether the row was judged at all.

    A row is not judged if a reward on one of its decisions is NaN, or if it has no decision; its R is 0.
    """
    total = jnp.where(mask, rewards, 0.0).sum(axis=1)
    valid = jnp.isfinite(total) & mask.any(axis=1)
    return jnp.where(valid, total, 0.0), valid


def fold_ends(
    rewards: Terms,
    mask: Mask | None,
    gamma: Weights = 1.0,
    terminated: Mask | None = None,
    truncated: Mask | None = None,
    final_values: Terms | None = None,
) -> tuple[Terms, Weights]:
    """Rewards and discounts in which the ends of episodes are written, for every function of this module.

        γ_t = 0 where decision t ended it, either way        r_t + γ V(last observation) where truncated

    A terminated episode has nothing beyond it. A truncated one would have gone on: it bootstraps from `final_values`.
    Raises ValueError for `truncated` without `final_values`.
    """
    if truncated is not None and final_values is None:
        raise ValueError("truncated decisions bootstrap: give final_values, V of the observation after each of them")
    if truncated is not None:
        cut = truncated if mask is None else truncated & mask
        cut = cut if terminated is None else cut & ~terminated
        rewards = rewards + jnp.where(cut, gamma * jnp.where(cut, final_values, 0.0), 0.0)
    for end in (terminated, truncated):
        gamma = gamma if end is None else jnp.where(end, 0.0, gamma).astype(rewards.dtype)
    return rewards, gamma


def discounted_returns(
    rewards: Terms, mask: Mask | None, gamma: Weights = 1.0, bootstrap: Float[Array, "*B"] | None = None
) -> Terms:
    """G_t = r_t + γ_t G_{t+1}; reward-to-go at γ = 1. After the last decision G = `bootstrap`, or 0."""
    return _returns(rewards, mask, gamma, bootstrap)[1]


def total_return(rewards: Terms, mask: Mask | None, gamma: Weights = 1.0) -> Float[Array, "*B"]:
    """R(τ) = Σ_t γ^t r_t, t counting the unmasked decisions from 0."""
    return _returns(rewards, mask, gamma, None)[0]


def _returns(rewards, mask, gamma, bootstrap):
    def step(following, _value, _next_value, reward, discount):
        here = reward + discount * following
        return here, here

    start = jnp.zeros_like(rewards[..., 0]) if bootstrap is None else bootstrap
    return _backward(step, start, mask, None, rewards, gamma)


def gae(
    rewards: Terms,
    values: Values,
    mask: Mask | None,
    gamma: Weights = 1.0,
    lam: Weights = 0.95,
    terminated: Mask | None = None,
    truncated: Mask | None = None,
    final_values: Terms | None = None,
) -> Terms:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        δ_t = r_t + γ_t V_{t+1} - V_t        Â_t = δ_t + γ_t λ_t Â_{t+1}

    The ends of episodes are those of `fold_ends`. The targets of the critic are Â + V: `lambda_returns`. Whitening is a
    separate step (`statistics.whiten`). λ = 0 is `td_errors`, λ = 1 the return less V.
    """
    rewards, gamma = fold_ends(rewards, mask, gamma, terminated, truncated, final_values)

    def step(next_advantage, value, next_value, reward, discount, further):
        advantage = reward - value + discount * (next_value + further * next_advantage)
        return advantage, advantage

    return _backward(step, jnp.zeros_like(values[..., -1]), mask, values, rewards, gamma, lam)[1]


def td_errors(rewards: Terms, values: Values, mask: Mask | None, gamma: Weights = 1.0) -> Terms:
    """δ_t = r_t + γ_t V_{t+1} - V_t: the errors of TD(0)."""
    return gae(rewards, values, mask, gamma, lam=0.0)


def lambda_returns(
    rewards: Terms, values: Values, mask: Mask | None, gamma: Weights = 1.0, lam: Weights = 0.95
) -> Terms:
    """G_t = r_t + γ_t ((1 - λ_t) V_{t+1} + λ_t G_{t+1}), which is GAE + V: the targets of the critic.

    λ = 1 is the Monte-Carlo return, λ = 0 the target of TD(0).
    """
    returns = gae(rewards, values, mask, gamma, lam) + values[..., :-1]
    return returns if mask is None else jnp.where(mask, returns, 0.0)


def n_step_returns(rewards: Terms, values: Values, mask: Mask | None, n: int, gamma: Weights = 1.0) -> Terms:
    """G_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}; fewer steps where fewer decisions follow. n = 1 is TD(0).

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n-step returns need n >= 1, not {n}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    T = rewards.shape[-1]
    own = jnp.where(mask, jnp.broadcast_to(jnp.arange(T), mask.shape), T)
    following = jax.lax.cummin(own, axis=own.ndim - 1, reverse=True)  # the first decision at t or after
    following = jnp.concatenate([following[..., 1:], jnp.full_like(own[..., :1], T)], axis=-1)  # after t; T: none
    gamma = jnp.where(mask, gamma, 0.0) if jnp.ndim(gamma) else gamma

    def extend(_, returns):
        beyond = jnp.concatenate([returns, values[..., -1:]], axis=-1)
        return jnp.where(mask, rewards + gamma * jnp.take_along_axis(beyond, following, axis=-1), 0.0)

    return jax.lax.fori_loop(0, n, extend, values[..., :-1])


class VTraceReturns(NamedTuple):
    """Of a policy π, estimated from what another one, μ, did."""

    targets: Terms  # v_t of the critic
    advantages: Terms  # Ψ_t of the policy gradient, the ratio ρ_t in it


def vtrace_returns(
    rewards: Terms,
    values: Values,
    ratios: Terms,
    mask: Mask | None,
    gamma: Weights = 1.0,
    lam: Weights = 1.0,
    rho_bar: Scalar = 1.0,
    c_bar: Scalar = 1.0,
    policy_rho_bar: Scalar = 1.0,
) -> VTraceReturns:
    """V-trace (IMPALA, arXiv:1802.01561, eq. 1), ρ_t = π(a_t | s_t) / μ(a_t | s_t).

        δ_t = min(ρ̄, ρ_t) (r_t + γ_t V_{t+1} - V_t)        v_t - V_t = δ_t + γ_t λ_t min(c̄, ρ_t) (v_{t+1} - V_{t+1})
        Ψ_t = min(ρ̄_π, ρ_t) (r_t + γ_t (V_{t+1} + λ_t (v_{t+1} - V_{t+1})) - V_t)

    The paper has λ = 1 (λ < 1 is its remark 2) and ρ̄ >= c̄. ρ̄ decides what the critic learns, V of a policy between
    μ and π; c̄ only how fast. On-policy the targets are `lambda_returns` and Ψ is `gae`, whatever λ is. rlax fixes
    c̄ = 1; it leaves masked columns to the caller's V_{t+1} and reports the next error at them.
    """

    def step(next_error, value, next_value, reward, ratio, discount, further):
        error = jnp.minimum(rho_bar, ratio) * (reward + discount * next_value - value)
        error = error + discount * further * jnp.minimum(c_bar, ratio) * next_error
        estimate = reward + discount * (next_value + further * next_error)
        advantage = jnp.minimum(policy_rho_bar, ratio) * (estimate - value)
        return error, VTraceReturns(value + error, advantage)

    return _backward(step, jnp.zeros_like(values[..., -1]), mask, values, rewards, ratios, gamma, lam)[1]


def importance_corrected_td_errors(
    rewards: Terms, values: Values, ratios: Terms, mask: Mask | None, gamma: Weights = 1.0, lam: Weights = 1.0
) -> Terms:
    """ρ_t (δ_t + γ_t λ_t ρ_{t+1} (δ_{t+1} + ...)): multi-step TD errors with per-decision importance sampling (Sutton,
    Mahmood, Precup, van Hasselt 2014, "A new Q(λ)"). V-trace without any clip: unbiased, its variance not bounded.
    """
    never = float("inf")
    return vtrace_returns(rewards, values, ratios, mask, gamma, lam, never, never, never).advantages
