"""Finite Markov decision processes as tables, and their exact values.

    V^π = r_π + γ P_π V^π        Q^π(s, a) = R(s, a) + γ Σ_s' P(s' | s, a) V^π(s')        V* = max_a Q*(s, a)

The first is one linear solve; the last is found by value iteration (Bellman 1957). A state whose row of P is zero is
terminal: nothing follows it, its value is 0. Everything is in the dtype of the tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step


class TabularMDP(NamedTuple):
    """S states, A actions."""

    P: jax.Array  # [S A S] probability of each next state; a zero row: terminal
    R: jax.Array  # [S A] expected reward
    gamma: jax.Array | float  # < 1, or every policy asked about ends


def tabulate(
    outcome: Callable,
    states: jax.Array,
    actions: int,
    terminal: jax.Array,
    gamma: float,
    slip: float | jax.Array = 0.0,
) -> TabularMDP:
    """The tables of a process with one outcome per (state, action); with probability `slip` a uniform action is taken.

    Args: outcome: (state, action) -> (index of the next state, reward). states: [S ...], in the order of their
    indices. terminal: [S] bool.
    """
    next_state, rewards = jax.vmap(jax.vmap(outcome, (None, 0)), (0, None))(states, jnp.arange(actions))
    P = jax.nn.one_hot(next_state, terminal.shape[0])
    P = (1.0 - slip) * P + slip * P.mean(axis=1, keepdims=True)
    R = (1.0 - slip) * rewards + slip * rewards.mean(axis=1, keepdims=True)
    return TabularMDP(jnp.where(terminal[:, None, None], 0.0, P), jnp.where(terminal[:, None], 0.0, R), gamma)


def state_values(mdp: TabularMDP, policy: jax.Array) -> jax.Array:
    """V^π [S] of a policy [S A], by a linear solve."""
    P = jnp.einsum("sa,sat->st", policy, mdp.P)
    return jnp.linalg.solve(jnp.eye(P.shape[0]) - mdp.gamma * P, (policy * mdp.R).sum(axis=1))


def lookahead(mdp: TabularMDP, values: jax.Array) -> jax.Array:
    """Q [S A] = R + γ P V for V = `values` [S]: Q^π of V^π, Q* of V*."""
    return mdp.R + mdp.gamma * mdp.P @ values


def action_values(mdp: TabularMDP, policy: jax.Array) -> jax.Array:
    """Q^π [S A]."""
    return lookahead(mdp, state_values(mdp, policy))


def optimal_values(mdp: TabularMDP, tolerance: float = 1e-6, max_iterations: int = 10_000) -> jax.Array:
    """V* [S] by value iteration: V ← max_a Q until no value changes by more than `tolerance` (1 - γ)/γ.

    V is then within `tolerance` of V* (γ < 1), but for rounding; at γ = 1 it stops where nothing changes.
    """
    bound = tolerance * (1.0 - mdp.gamma) / mdp.gamma

    def sweep(carry):
        n, values, _ = carry
        new = lookahead(mdp, values).max(axis=1)
        return n + 1, new, jnp.abs(new - values).max()

    def moving(carry):
        n, _, change = carry
        return (change > bound) & (n < max_iterations)

    start = (0, jnp.zeros_like(mdp.R[:, 0]), jnp.inf)
    _, values, _ = jax.lax.while_loop(moving, sweep, start)
    return values


def optimal_action_values(mdp: TabularMDP, tolerance: float = 1e-6) -> jax.Array:
    """Q* [S A]."""
    return lookahead(mdp, optimal_values(mdp, tolerance))


class State(NamedTuple):
    index: jax.Array
    time: jax.Array  # steps so far


class TabularParams(NamedTuple):
    mdp: TabularMDP
    start: jax.Array  # [S] probability that an episode starts there
    max_steps: jax.Array  # an episode is truncated after


def tabular_env(
    mdp: TabularMDP, start: jax.Array | None = None, max_steps: int = 1000, observe: Callable | None = None
) -> Env:
    """The process as an Env that pays the expected reward.

    Args: start: [S] probabilities; None: state 0. observe: (state, S) -> observation; None: one-hot [S].
    """
    S, A = mdp.R.shape
    observe = observe or jax.nn.one_hot
    start = jax.nn.one_hot(0, S) if start is None else jnp.asarray(start)

    def reset(key, params: TabularParams):
        state = State(jax.random.categorical(key, jnp.log(params.start)), jnp.int32(0))
        return observe(state.index, S), state

    def step(key, state: State, action, params: TabularParams) -> Step:
        next_state = jax.random.categorical(key, jnp.log(params.mdp.P[state.index, action]))
        new = State(next_state, state.time + 1)
        terminated = params.mdp.P[next_state].sum() == 0
        truncated = ~terminated & (new.time >= params.max_steps)
        return Step(observe(next_state, S), new, params.mdp.R[state.index, action], terminated, truncated, {})

    return Env(reset, step, A, TabularParams(mdp, start, jnp.int32(max_steps)))
