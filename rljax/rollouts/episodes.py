"""Episodes of a pure environment: one scan over time, all rows at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.types import Params, Trajectory


def episodes(env, act: Callable, params: Params, key, rows: int, length: int) -> Trajectory:
    """One episode a row, of at most `length` decisions; columns after its end are masked.

    Args: env: reset, step, params as `rljax.envs.env.Env`. act: (params, key, observations [B ...]) -> (actions [B],
    log-probs [B]). An episode still running at the end is truncated there.
    """
    reset_key, key = jax.random.split(key)
    observation, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, rows), env.params)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def one(carry, key):
        observation, state, alive = carry
        act_key, step_key = jax.random.split(key)
        action, logp = act(params, act_key, observation)
        out = step(jax.random.split(step_key, rows), state, action, env.params)
        facts = {
            "inputs": observation,
            "actions": action,
            "logp": logp,
            "mask": alive,
            "rewards": jnp.where(alive, out.reward, 0.0),
            "terminated": out.terminated & alive,
            "truncated": out.truncated & alive,
        }
        return (out.observation, out.state, alive & ~(out.terminated | out.truncated)), facts

    start = (observation, state, jnp.ones(rows, bool))
    (_, _, alive), facts = jax.lax.scan(one, start, jax.random.split(key, length))
    facts = {name: jnp.moveaxis(value, 0, 1) for name, value in facts.items()}
    facts["truncated"] = facts["truncated"].at[:, -1].set(facts["truncated"][:, -1] | alive)
    return Trajectory(**facts, group=jnp.zeros(rows, jnp.int32))
