"""Fixed-length rollouts of environments that are reset where an episode ends: N environments at once, T steps.

A row holds pieces of several episodes, and the next call carries on where this one stopped. The ends are in
`terminated` and `truncated`; what each decision led to, before any reset, in `next_inputs`, from which `values` and
`final_values` are filled. Time is the first axis only inside the scan.

All random numbers are drawn before the scan, and so are the states that resets take (`draw_noise`): inside it a random
number costs as much as a step of CartPole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rljax.types import Array, Params, Trajectory

Carry = tuple[Any, Any]  # observations and states of N environments


class Noise(NamedTuple):
    """All that T steps of N environments leave to chance: the leading axes are [T N]."""

    uniforms: Array  # [T N draws] for the actor
    keys: Array  # [T N] for the environments' steps
    resets: Carry  # observation and state of the episode that would start after each step


def reset_envs(env: Any, key: Array, rows: int) -> Carry:
    """Observations and states of `rows` environments at the start of an episode: the first `carry`."""
    return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, rows), env.params)


def draw_noise(env: Any, key: Array, rows: int, length: int, draws: int = 1) -> Noise:
    """Random numbers and resets for `length` steps of `rows` environments; `draws`: uniform numbers a decision."""
    actor_key, step_key, reset_key = jax.random.split(key, 3)
    n = length * rows  # in one row: XLA's CPU backend takes seconds to compile random numbers of shapes like [T N 1]
    tiny = jnp.finfo(jnp.float32).tiny
    uniforms = jax.random.uniform(actor_key, (n * draws,), minval=tiny).reshape(n, draws)
    resets = reset_envs(env, reset_key, n)
    noise = Noise(uniforms, jax.random.split(step_key, n), resets)
    return jax.tree.map(lambda x: x.reshape(length, rows, *x.shape[1:]), noise)


def unroll(env: Any, act: Callable, params: Params, noise: Noise, carry: Carry) -> tuple[Carry, Trajectory]:
    """As many steps of each environment as `noise` is drawn for -> (carry, Trajectory [N T]).

    Args: env: as `rljax.envs.env.Env`; its `step` does not reset. act: (params, uniforms [N draws],
    observations [N ...]) -> (actions [N ...], log-probs [N]). carry: from `reset_envs` or the call before.
    """
    env_step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def one_step(carry: Carry, noise: Noise):
        observation, state = carry
        action, logp = act(params, noise.uniforms, observation)
        out = env_step(noise.keys, state, action, env.params)
        ended = out.terminated | out.truncated

        def reset_if_ended(first, last):
            return jnp.where(ended.reshape(ended.shape + (1,) * (last.ndim - 1)), first, last)

        facts = {
            "inputs": observation,
            "actions": action,
            "logp": logp,
            "next_inputs": out.observation,
            "rewards": out.reward,
            "terminated": out.terminated,
            "truncated": out.truncated,
        }
        return jax.tree.map(reset_if_ended, noise.resets, (out.observation, out.state)), facts

    carry, facts = jax.lax.scan(one_step, carry, noise)
    facts = {name: jnp.moveaxis(value, 0, 1) for name, value in facts.items()}
    mask = jnp.ones(facts["logp"].shape, bool)
    return carry, Trajectory(mask=mask, **facts)


def episode_returns(traj: Trajectory, running: Array) -> tuple[Array, Array, Array]:
    """Returns of the episodes that ended in an unroll: (sum of returns, how many, running [N]).

    `running`: rewards so far of the episodes that have not ended, zeros [N] to begin with.
    """
    ended = traj.terminated | traj.truncated
    ends_later = jnp.flip(jnp.cumsum(jnp.flip(ended, axis=1), axis=1), axis=1) > 0  # an end here or later
    until_last_end = jnp.where(ends_later, traj.rewards, 0.0).sum(axis=1)
    after_last_end = jnp.where(ends_later, 0.0, traj.rewards).sum(axis=1)
    any_end = ends_later[:, 0]
    total = jnp.where(any_end, running + until_last_end, 0.0).sum()
    running = jnp.where(any_end, after_last_end, running + after_last_end)
    return total, ended.sum(), running
