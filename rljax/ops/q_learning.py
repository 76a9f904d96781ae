"""Temporal-difference errors of values and action values: target - prediction, the target constant.

r is the reward of action a in state s, γ the discount of the next state (0 if s' is terminal, not if the episode was
truncated), primes are the next state and action. N transitions, A actions. The update is Q(s, a) += α · error; the loss
½ error² or a Huber of it.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

PerTransition = Float[Array, "*N"]
ActionValues = Float[Array, "*N A"]
Actions = Int[Array, "*N"]


def action_value(q: ActionValues, actions: Actions) -> PerTransition:
    """Q(s, a)."""
    return jnp.take_along_axis(q, actions[..., None], axis=-1)[..., 0]


def td_learning(
    values: PerTransition, rewards: PerTransition, gamma: PerTransition, next_values: PerTransition
) -> PerTransition:
    """r + γ V(s') - V(s) (TD(0), Sutton 1988)."""
    return stop_gradient(rewards + gamma * next_values) - values


def q_learning(
    q: ActionValues, actions: Actions, rewards: PerTransition, gamma: PerTransition, next_q: ActionValues
) -> PerTransition:
    """r + γ max_a' Q(s', a') - Q(s, a) (Watkins 1989). DQN takes `next_q` of a target network (Mnih et al. 2015)."""
    return td_learning(action_value(q, actions), rewards, gamma, next_q.max(axis=-1))


def sarsa(
    q: ActionValues,
    actions: Actions,
    rewards: PerTransition,
    gamma: PerTransition,
    next_q: ActionValues,
    next_actions: Actions,
) -> PerTransition:
    """r + γ Q(s', a') - Q(s, a) with the action a' that was taken (Rummery & Niranjan 1994)."""
    return td_learning(action_value(q, actions), rewards, gamma, action_value(next_q, next_actions))


def expected_sarsa(
    q: ActionValues,
    actions: Actions,
    rewards: PerTransition,
    gamma: PerTransition,
    next_q: ActionValues,
    next_probs: ActionValues,
) -> PerTransition:
    """r + γ Σ_a' π(a' | s') Q(s', a') - Q(s, a) (van Seijen et al. 2009)."""
    return td_learning(action_value(q, actions), rewards, gamma, (next_probs * next_q).sum(axis=-1))


def double_q_learning(
    q: ActionValues,
    actions: Actions,
    rewards: PerTransition,
    gamma: PerTransition,
    next_q: ActionValues,
    next_q_selector: ActionValues,
) -> PerTransition:
    """r + γ Q(s', argmax_a' Q_selector(s', a')) - Q(s, a) (van Hasselt 2010).

    Double DQN (arXiv:1509.06461): the selector is the network being trained, `next_q` the target network.
    """
    best = jnp.argmax(next_q_selector, axis=-1)
    return td_learning(action_value(q, actions), rewards, gamma, action_value(next_q, best))


def huber(error: PerTransition, bound: float = 1.0) -> PerTransition:
    """½ e² where |e| <= bound, bound (|e| - ½ bound) beyond: a gradient of at most `bound` (Huber 1964)."""
    size = jnp.abs(error)
    inside = jnp.minimum(size, bound)
    return inside * (size - 0.5 * inside)
