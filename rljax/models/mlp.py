"""A multilayer perceptron as a policy over discrete actions, with a value head: for control."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.ops.logprobs import chosen_logp, entropy
from rljax.types import Params, PolicyOutput, Trajectory


def init(key, observation: int, actions: int, width: int = 64) -> Params:
    """Two tanh layers; heads start at 0, so that the first policy is uniform and the first values are 0."""
    first, second = jax.random.split(key)
    return {
        "first": {"w": jax.random.normal(first, (observation, width)) * observation**-0.5, "b": jnp.zeros(width)},
        "second": {"w": jax.random.normal(second, (width, width)) * width**-0.5, "b": jnp.zeros(width)},
        "action": {"w": jnp.zeros((width, actions)), "b": jnp.zeros(actions)},
        "value": {"w": jnp.zeros((width, 1)), "b": jnp.zeros(1)},
    }


def apply(params: Params, observations) -> tuple:
    """observations [.. D] -> logits [.. A], values [..]."""

    def linear(name, x):
        bias = params[name]["b"]
        return x @ params[name]["w"] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)

    hidden = jnp.tanh(linear("second", jnp.tanh(linear("first", observations))))
    return linear("action", hidden), linear("value", hidden)[..., 0]


def act(params: Params, key, observations) -> tuple:
    """Draw actions [B] and give their log-probs."""
    logits, _ = apply(params, observations)
    actions = jax.random.categorical(key, logits)
    return actions, chosen_logp(logits, actions, jnp.ones(actions.shape))


def make_policy() -> Callable:
    """policy(params, frozen, trajectory) -> PolicyOutput."""

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        logits, values = apply(params, traj.inputs)
        ones = jnp.ones(traj.actions.shape)
        return PolicyOutput(chosen_logp(logits, traj.actions, ones), entropy(logits, ones), values)

    return policy
