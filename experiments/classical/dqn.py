"""Deep Q-learning: exploration, replay and updates in one compiled run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rljax.algorithms.dqn import dqn
from rljax.envs.env import Box, Env
from rljax.models import mlp
from rljax.rollouts import replay
from rljax.rollouts.episodes import episodes
from rljax.rollouts.unroll import draw_noise, episode_returns, reset_envs, unroll
from rljax.train.compiled import polyak_update
from rljax.train.update import make_update
from rljax.types import TrainState, Transition


class Hyper(NamedTuple):
    """Traced: other values need no other compilation."""

    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    epsilon: float = 0.05  # of the exploration, after it fell from 1
    falling: float = 0.5  # share of the steps over which it falls
    share: float = 1.0  # of the network in its target, where that is due


class Sizes(NamedTuple):
    """Of a run: not traced. Intervals are in steps of the environments, all rows together."""

    steps: int = 500_000
    rows: int = 10  # environments at once
    every: int = 10  # steps between updates
    updates: int = 1  # each time
    target_every: int = 500  # steps between changes of the target network
    start: int = 10_000  # steps before the first update
    capacity: int = 10_000  # transitions kept
    batch: int = 128  # transitions of an update
    n: int = 1  # steps of a transition; at most every / rows
    double: bool = False
    huber: float | None = None


def make_train(env: Env, sizes: Sizes) -> Callable:
    """train(params, key, hyper) -> (params, curve): curve holds a number for each update; see `on_policy.make_train`.

    Raises ValueError where rows, intervals and capacity do not divide one another, steps are too few or n too large.
    """
    for name, whole, part in (
        ("every", sizes.every, sizes.rows),
        ("target_every", sizes.target_every, sizes.every),
        ("capacity", sizes.capacity, sizes.every),
    ):
        if whole % part:
            raise ValueError(f"{name} = {whole} must be a multiple of {part}: intervals count steps of all rows")
    iterations, length = sizes.steps // sizes.every, sizes.every // sizes.rows
    if iterations < 1 or sizes.steps <= sizes.start:
        least = f"more than start = {sizes.start}, before which nothing is learnt, and at least every = {sizes.every}"
        raise ValueError(f"steps = {sizes.steps}; legal: {least}")
    if sizes.n > length:
        raise ValueError(f"n = {sizes.n}; legal: n at most every / rows = {length}, the steps of one piece")
    together = max(n for n in range(1, 129) if iterations % n == 0)  # iterations whose random numbers are drawn at once

    def train(params, key, hyper: Hyper):
        optimizer = optax.flatten(optax.adam(hyper.learning_rate))
        update = make_update(dqn(mlp.q_values, sizes.double, sizes.huber), optimizer)
        starting, learning, key = jax.random.split(key, 3)
        carry = reset_envs(env, starting, sizes.rows)
        see = jax.ShapeDtypeStruct(carry[0].shape[1:], carry[0].dtype)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        kept = replay.init_buffer(
            Transition(see, jax.ShapeDtypeStruct((), jnp.int32), number, see, number), sizes.capacity
        )
        state = TrainState(
            jnp.int32(0), params, optimizer.init(params), learning, {"target": params}, extra=(carry, kept)
        )

        def iteration(carried, now):
            (state, running), (n, playing, drawing) = carried, now
            carry, kept = state.extra
            epsilon = jnp.maximum(1.0 - (1.0 - hyper.epsilon) * n / (hyper.falling * iterations), hyper.epsilon)
            carry, traj = unroll(env, mlp.act_epsilon_greedily, (state.params, epsilon), playing, carry)
            kept = replay.add_to_buffer(kept, replay.transitions(traj, hyper.gamma, sizes.n))

            def learn(state):
                def one(state, bits):
                    return update(state, replay.sample_from_buffer(kept, bits))[0], None

                return jax.lax.scan(one, state, drawing)[0]

            seen = (n + 1) * sizes.every
            learner = jax.lax.cond(seen > sizes.start, learn, lambda state: state, state.replace(extra=None))
            target = polyak_update(
                learner.frozen["target"], learner.params, hyper.share, seen % sizes.target_every == 0
            )
            state = learner.replace(frozen={"target": target}, extra=(carry, kept))
            total, count, running = episode_returns(traj, running)
            return (state, running), {"return": total / jnp.maximum(count, 1), "episodes": count}

        def several(carried, now):
            n, key = now
            playing, drawing = jax.random.split(key)
            playing = draw_noise(env, playing, sizes.rows, together * length)
            playing = jax.tree.map(lambda x: x.reshape(together, length, *x.shape[1:]), playing)
            drawing = jax.random.bits(drawing, (together, sizes.updates, sizes.batch))
            return jax.lax.scan(iteration, carried, (n, playing, drawing))

        now = jnp.arange(iterations).reshape(-1, together), jax.random.split(key, iterations // together)
        (state, _), curve = jax.lax.scan(several, (state, jnp.zeros(sizes.rows)), now)
        curve = jax.tree.map(jnp.ravel, curve)
        return state.params, curve

    return train


def init(env: Env, key, widths: tuple[int, ...] = (120, 84)):
    """Parameters of the network: to be made outside of what is compiled.

    Raises ValueError for an environment with continuous actions.
    """
    if isinstance(env.actions, Box):
        raise ValueError("deep Q-learning takes the best of finitely many actions; this environment's are continuous")
    observation = jax.eval_shape(env.reset, key, env.params)[0]
    return mlp.init_q(key, observation.shape[0], env.actions, widths)


def play_greedily(env: Env, length: int = 500) -> Callable:
    """play(params, key, rows) -> Trajectory of fresh episodes, the best action taken throughout."""
    return lambda params, key, rows: episodes(env, mlp.act_epsilon_greedily, (params, 0.0), key, rows, length)
