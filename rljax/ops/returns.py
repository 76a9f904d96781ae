"""Returns and advantages over time.

Time is the last axis; column t is one decision: r_t follows a_t, V_t is the value of the state before it. Columns with
mask False (prompt, tool output, padding) are skipped: the decision to their left continues with the one to their right,
as if they were not there. V_{t+1} is the value at the *next unmasked* decision, values[..., T] after the last one (0
for text, whose last token ends the episode). Masked columns may hold garbage; results are 0 there. A mask of None means
that all columns are decisions, which saves time; so do time-major arrays [T B] given as `gae(r.T, v.T, None).T`: the
two transposes cancel under jit, and the scan reads contiguous memory (`experiments/benchmarks/returns.py`).

γ and λ are scalars or arrays with one number per decision [.. T]; both weight what follows their decision. γ_t is 0
where decision t ended its episode; `fold_ends` computes such γ and the rewards of truncated episodes.

The policy gradient is E Σ_t ∇log π(a_t | s_t) Ψ_t (Schulman et al. 2016, arXiv:1506.02438, eq. 1). Ψ_t may be

    R(τ), the return of the whole episode              total_return
    Σ_{t' ≥ t} r_t', reward-to-go                      discounted_returns
    reward-to-go less a baseline b(s_t)                discounted_returns - b; b = V(s_t): gae at λ = 1
    Q(s_t, a_t)                                        known, or estimated: n_step_returns, lambda_returns
    A(s_t, a_t) = Q - V                                known, or estimated: n_step_returns - V
    the TD residual r_t + γ V_{t+1} - V_t              td_errors
    Â_t, GAE(γ, λ)                                     gae; off-policy: vtrace_returns(...).advantages

The first three are unbiased, as are exact Q and A; the last two if V is the policy's own value (GAE also at λ = 1). At
γ < 1 all omit the factor γ^t of decision t, as is usual.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops.shapes import Scalar

Decisions = Float[Array, "*B T"]
StateValues = Float[Array, "*B T+1"]
DecisionMask = Bool[Array, "*B T"]
DiscountFactors = float | Float[Array, ""] | Float[Array, "*B T"]  # γ, λ


def _backward(step, carry, mask, values, *numbers):
    """Scan the decisions from the last to the first: step(carry, V_t, V_{t+1}, *numbers) -> carry, out.

    Arrays are [B T] outside and [B] inside; scalars stay scalars. At a masked column the step gets zeros (garbage times
    a zero cotangent is a NaN gradient), the carry is unchanged, and the output is 0. Raises ValueError unless values
    have T + 1 columns.
    """
    T = numbers[0].shape[-1]
    if values is not None and values.shape[-1] != T + 1:
        raise ValueError(
            f"values of {values.shape[-1]} columns for {T} decisions; legal: {T + 1}, V after the last too"
        )

    def time_major(x):
        return jnp.moveaxis(x, -1, 0)

    columns = [time_major(x) if jnp.ndim(x) else None for x in numbers]
    values_by_time = None if values is None else time_major(values)

    def value_at(t):  # slicing off values[..., 1:] would copy
        return None if values is None else jax.lax.dynamic_index_in_dim(values_by_time, t, keepdims=False)

    def scan_step(state, column):
        carry, following = state
        t, valid, row = column
        if mask is None:
            found = (x if c is None else c for x, c in zip(numbers, row, strict=True))
            carry, out = step(carry, value_at(t), value_at(t + 1), *found)
            return (carry, None), out

        def keep(new, old):
            return jnp.where(valid, new, old)

        found = (x if c is None else keep(c, 0.0) for x, c in zip(numbers, row, strict=True))
        value = None if values is None else keep(value_at(t), 0.0)
        new, out = step(carry, value, following, *found)
        state = jax.tree.map(keep, (new, value), (carry, following))
        return state, jax.tree.map(lambda x: keep(x, 0.0), out)

    start = (carry, None if values is None or mask is None else values[..., -1])
    scanned = (jnp.arange(T), None if mask is None else time_major(mask), columns)
    (carry, _), out = jax.lax.scan(scan_step, start, scanned, reverse=True)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), out)


def episode_rewards(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """R_i = Σ_t r_it over each row's decisions, and whether the row is valid.

    A row is not valid if a reward on one of its decisions is NaN, or if it has no decision; its R is then 0.
    """
    total = jnp.where(mask, rewards, 0.0).sum(axis=1)
    valid = jnp.isfinite(total) & mask.any(axis=1)
    return jnp.where(valid, total, 0.0), valid


def correct_episodes(
    rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    scores: Float[Array, "B K"] | None = None,
    above: Scalar = 0.0,
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Which rows are correct, and which are valid (`episode_rewards`).

    A valid row is correct if the first of its scores that is no NaN is above `above`: the first verifier that applies
    to it, whatever else the reward is made of. Without scores its R is compared.
    """
    total, valid = episode_rewards(rewards, mask)
    if scores is not None:
        first = jnp.isfinite(scores).argmax(axis=1, keepdims=True)
        total = jnp.take_along_axis(scores, first, axis=1)[:, 0]
    return valid & (total > above), valid


def fold_ends(
    rewards: Decisions,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    terminated: DecisionMask | None = None,
    truncated: DecisionMask | None = None,
    final_values: Decisions | None = None,
) -> tuple[Decisions, DiscountFactors]:
    """Rewards and discounts that encode the ends of episodes, for every function of this module.

        γ_t = 0 where decision t ended it, either way        r_t + γ V(last observation) where truncated

    Nothing follows a terminated episode. A truncated one would have continued: it bootstraps from `final_values`.
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
    rewards: Decisions,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    bootstrap: Float[Array, "*B"] | None = None,
) -> Decisions:
    """G_t = r_t + γ_t G_{t+1}; reward-to-go at γ = 1. After the last decision G = `bootstrap`, or 0."""
    return _returns(rewards, mask, gamma, bootstrap)[1]


def total_return(rewards: Decisions, mask: DecisionMask | None, gamma: DiscountFactors = 1.0) -> Float[Array, "*B"]:
    """R(τ) = Σ_t γ^t r_t, t counting the unmasked decisions from 0."""
    return _returns(rewards, mask, gamma, None)[0]


def _returns(rewards, mask, gamma, bootstrap):
    def step(following, _value, _next_value, reward, discount):
        here = reward + discount * following
        return here, here

    start = jnp.zeros_like(rewards[..., 0]) if bootstrap is None else bootstrap
    return _backward(step, start, mask, None, rewards, gamma)


def gae(
    rewards: Decisions,
    values: StateValues,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    lam: DiscountFactors = 0.95,
    terminated: DecisionMask | None = None,
    truncated: DecisionMask | None = None,
    final_values: Decisions | None = None,
) -> Decisions:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        δ_t = r_t + γ_t V_{t+1} - V_t        Â_t = δ_t + γ_t λ_t Â_{t+1}

    Ends of episodes are handled by `fold_ends`. The targets of the critic are Â + V: `lambda_returns`. Whitening is a
    separate step (`statistics.whiten`). λ = 0 is `td_errors`, λ = 1 the return minus V.
    """
    rewards, gamma = fold_ends(rewards, mask, gamma, terminated, truncated, final_values)

    def step(next_advantage, value, next_value, reward, discount, further):
        advantage = reward - value + discount * (next_value + further * next_advantage)
        return advantage, advantage

    return _backward(step, jnp.zeros_like(values[..., -1]), mask, values, rewards, gamma, lam)[1]


def td_errors(
    rewards: Decisions, values: StateValues, mask: DecisionMask | None, gamma: DiscountFactors = 1.0
) -> Decisions:
    """δ_t = r_t + γ_t V_{t+1} - V_t: the errors of TD(0)."""
    return gae(rewards, values, mask, gamma, lam=0.0)


def lambda_returns(
    rewards: Decisions,
    values: StateValues,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    lam: DiscountFactors = 0.95,
) -> Decisions:
    """G_t = r_t + γ_t ((1 - λ_t) V_{t+1} + λ_t G_{t+1}), which is GAE + V: the targets of the critic.

    λ = 1 is the Monte-Carlo return, λ = 0 the target of TD(0).
    """
    returns = gae(rewards, values, mask, gamma, lam) + values[..., :-1]
    return returns if mask is None else jnp.where(mask, returns, 0.0)


def n_step_returns(
    rewards: Decisions, values: StateValues, mask: DecisionMask | None, n: int, gamma: DiscountFactors = 1.0
) -> Decisions:
    """G_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}; fewer steps if fewer decisions follow. n = 1 is TD(0).

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n-step returns need n >= 1, not {n}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    T = rewards.shape[-1]
    own = jnp.where(mask, jnp.broadcast_to(jnp.arange(T), mask.shape), T)
    following = jax.lax.cummin(own, axis=own.ndim - 1, reverse=True)  # the first decision at t or later
    following = jnp.concatenate([following[..., 1:], jnp.full_like(own[..., :1], T)], axis=-1)  # after t; T: none
    gamma = jnp.where(mask, gamma, 0.0) if jnp.ndim(gamma) else gamma

    def extend(_, returns):
        beyond = jnp.concatenate([returns, values[..., -1:]], axis=-1)
        return jnp.where(mask, rewards + gamma * jnp.take_along_axis(beyond, following, axis=-1), 0.0)

    return jax.lax.fori_loop(0, n, extend, values[..., :-1])


class VTraceReturns(NamedTuple):
    """Estimates for a policy π from the decisions of another policy μ."""

    targets: Decisions  # v_t, for the critic
    advantages: Decisions  # Ψ_t, for the policy gradient, with the ratio ρ_t included


def vtrace_returns(
    rewards: Decisions,
    values: StateValues,
    ratios: Decisions,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    lam: DiscountFactors = 1.0,
    rho_bar: Scalar = 1.0,
    c_bar: Scalar = 1.0,
    policy_rho_bar: Scalar = 1.0,
) -> VTraceReturns:
    """V-trace (IMPALA, arXiv:1802.01561, eq. 1), ρ_t = π(a_t | s_t) / μ(a_t | s_t).

        δ_t = min(ρ̄, ρ_t) (r_t + γ_t V_{t+1} - V_t)        v_t - V_t = δ_t + γ_t λ_t min(c̄, ρ_t) (v_{t+1} - V_{t+1})
        Ψ_t = min(ρ̄_π, ρ_t) (r_t + γ_t (V_{t+1} + λ_t (v_{t+1} - V_{t+1})) - V_t)

    The paper has λ = 1 (λ < 1 is its remark 2) and ρ̄ >= c̄. ρ̄ determines what the critic learns, V of a policy
    between μ and π; c̄ only how fast. On-policy the targets are `lambda_returns` and Ψ is `gae`, whatever λ is. rlax
    fixes c̄ = 1; it leaves masked columns to the caller's V_{t+1} and returns the next error there.
    """

    def step(next_error, value, next_value, reward, ratio, discount, further):
        error = jnp.minimum(rho_bar, ratio) * (reward + discount * next_value - value)
        error = error + discount * further * jnp.minimum(c_bar, ratio) * next_error
        estimate = reward + discount * (next_value + further * next_error)
        advantage = jnp.minimum(policy_rho_bar, ratio) * (estimate - value)
        return error, VTraceReturns(value + error, advantage)

    return _backward(step, jnp.zeros_like(values[..., -1]), mask, values, rewards, ratios, gamma, lam)[1]


def importance_corrected_td_errors(
    rewards: Decisions,
    values: StateValues,
    ratios: Decisions,
    mask: DecisionMask | None,
    gamma: DiscountFactors = 1.0,
    lam: DiscountFactors = 1.0,
) -> Decisions:
    """ρ_t (δ_t + γ_t λ_t ρ_{t+1} (δ_{t+1} + ...)): multi-step TD errors with per-decision importance sampling (Sutton,
    Mahmood, Precup, van Hasselt 2014, "A new Q(λ)"). V-trace without any clip: unbiased, with unbounded variance.
    """
    no_clip = float("inf")
    return vtrace_returns(rewards, values, ratios, mask, gamma, lam, no_clip, no_clip, no_clip).advantages
