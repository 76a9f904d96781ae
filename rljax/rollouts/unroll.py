"""Fixed-length rollouts of environments that begin anew where an episode ended: N of them at once, T steps.

A row holds pieces of several episodes, and the next call carries on where this one stopped. The ends stand in
`terminated` and `truncated`; what each decision led to, before any reset, in `next_inputs`: whoever fills `values` and
`final_values` reads it. Time is the first axis only inside the scan.

All random numbers are drawn before the scan, and so are the states that resets fall back on (`chance`): inside it a
random number costs as much as a step of CartPole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.types import Params, Trajectory


def begin(env, key, rows: int) -> tuple:
    """Observations and states of `rows` fresh environments: the first `carry`."""
    return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, rows), env.params)


def chance(env, key, rows: int, length: int, draws: int = 1) -> tuple:
    """What `length` steps of `rows` environments leave to chance, [T N ...] each: `draws` uniform numbers for the
    actor, a key for the step, the episode that would begin after it.
    """
    acting, stepping, resetting = jax.random.split(key, 3)
    n = length * rows  # in one row: XLA's CPU backend takes seconds to compile random numbers of shapes like [T N 1]
    uniforms = jax.random.uniform(acting, (n * draws,), minval=jnp.finfo(jnp.float32).tiny).reshape(n, draws)
    fresh = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(resetting, n), env.params)
    drawn = uniforms, jax.random.split(stepping, n), fresh
    return jax.tree.map(lambda x: x.reshape(length, rows, *x.shape[1:]), drawn)


def unroll(env, act: Callable, params: Params, chance: tuple, carry: tuple) -> tuple:
    """As many steps of each environment as `chance` is drawn for -> (carry, Trajectory [N T]).

    Args: env: reset, step, params as `rljax.envs.env.Env`; its own `step` need not reset. act: (params, uniforms
    [N draws], observations [N ...]) -> (actions [N ...], log-probs [N]). carry: (observations, states), from `begin` or
    the call before.
    """
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def one(carry, drawn):
        (observation, state), (uniform, key, fresh) = carry, drawn
        action, logp = act(params, uniform, observation)
        out = step(key, state, action, env.params)
        ended = out.terminated | out.truncated

        def anew(first, last):
            return jnp.where(ended.reshape(ended.shape + (1,) * (last.ndim - 1)), first, last)

        facts = {
            "inputs": observation,
            "actions": action,
            "logp": logp,
            "next_inputs": out.info.get("final_observation", out.observation),  # of an environment that resets itself
            "rewards": out.reward,
            "terminated": out.terminated,
            "truncated": out.truncated,
        }
        return jax.tree.map(anew, fresh, (out.observation, out.state)), facts

    carry, facts = jax.lax.scan(one, carry, chance)
    facts = {name: jnp.moveaxis(value, 0, 1) for name, value in facts.items()}
    return carry, Trajectory(mask=jnp.ones(facts["logp"].shape, bool), **facts)


def finished(traj: Trajectory, running) -> tuple:
    """What the episodes that ended in an unroll earned: (sum of returns, how many, running [N]).

    `running`: earned so far by the episodes that go on, zeros [N] to begin with.
    """
    ended = traj.terminated | traj.truncated
    closed = jnp.flip(jnp.cumsum(jnp.flip(ended, axis=1), axis=1), axis=1) > 0  # an end here or later
    within = jnp.where(closed, traj.rewards, 0.0).sum(axis=1)
    after = jnp.where(closed, 0.0, traj.rewards).sum(axis=1)
    returns = jnp.where(closed[:, 0], running + within, 0.0).sum()
    return returns, ended.sum(), jnp.where(closed[:, 0], after, running + after)
