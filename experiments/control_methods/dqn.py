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
from rljax.types import Params, TrainState, Trajectory, Transition

# Iterations whose random numbers are drawn together, at most. It is a divisor of their number: where that is a prime,
# each iteration draws for itself, which is slower.
MAX_CHUNK = 128


class Hyperparams(NamedTuple):
    """Traced: another value needs no other compilation."""

    learning_rate: float = 2.5e-4
    gamma: float = 0.99  # discount
    final_epsilon: float = 0.05  # probability of a uniform action, after it decreased from 1
    exploration_fraction: float = 0.5  # share of the run over which it decreases
    tau: float = 1.0  # share of the network in its target at each update of the target; 1: a copy


class Sizes(NamedTuple):
    """Static: another value compiles another program. Intervals are in steps of all environments together."""

    total_steps: int = 500_000  # best a multiple of 128 train_frequency: see MAX_CHUNK
    num_envs: int = 10  # environments at once
    train_frequency: int = 10  # steps between trainings
    gradient_steps: int = 1  # updates of each training
    target_frequency: int = 500  # steps between updates of the target network
    learning_starts: int = 10_000  # steps before the first training
    buffer_size: int = 10_000  # transitions
    batch_size: int = 128  # transitions of an update
    n_step: int = 1  # steps of a transition; at most train_frequency / num_envs
    double: bool = False  # double DQN
    huber: float | None = None  # where the loss turns linear; None: squared errors


def make_train(env: Env, sizes: Sizes) -> Callable:
    """train(params, key, hyper) -> (params, curve).

    curve: `return` and `episodes`, as `on_policy.make_train` has them, a number for each train_frequency steps.

    Raises ValueError where intervals and sizes do not divide one another, total_steps are too few or n_step too large.
    """
    check_sizes(sizes)
    iterations = sizes.total_steps // sizes.train_frequency
    chunk = max(n for n in range(1, MAX_CHUNK + 1) if iterations % n == 0)

    def train(params: Params, key, hyper: Hyperparams):
        optimizer = optax.flatten(optax.adam(hyper.learning_rate))
        update = make_update(dqn(mlp.q_values, sizes.double, sizes.huber), optimizer)
        reset_key, learner_key, key = jax.random.split(key, 3)
        envs = reset_envs(env, reset_key, sizes.num_envs)
        buffer = empty_buffer(envs[0], sizes.buffer_size)
        target = {"target": params}
        state = TrainState(jnp.int32(0), params, optimizer.init(params), learner_key, target, extra=(envs, buffer))

        def train_on_replay(state: TrainState, buffer, bits):
            def gradient_step(state, bits):
                state, _ = update(state, replay.sample_from_buffer(buffer, bits))
                return state, None

            return jax.lax.scan(gradient_step, state, bits)[0]

        def iteration(carry, scanned):
            state, running_return = carry
            n, noise, bits = scanned
            envs, buffer = state.extra
            epsilon = exploration_epsilon(hyper, n, iterations)
            envs, traj = unroll(env, mlp.act_epsilon_greedily, (state.params, epsilon), noise, envs)
            buffer = replay.add_to_buffer(buffer, replay.transitions(traj, hyper.gamma, sizes.n_step))

            steps_done = (n + 1) * sizes.train_frequency
            state = jax.lax.cond(
                steps_done > sizes.learning_starts,
                lambda state: train_on_replay(state, buffer, bits),
                lambda state: state,
                state.replace(extra=None),
            )
            due = steps_done % sizes.target_frequency == 0
            target = polyak_update(state.frozen["target"], state.params, hyper.tau, due)
            state = state.replace(frozen={"target": target}, extra=(envs, buffer))
            total, count, running_return = episode_returns(traj, running_return)
            return (state, running_return), {"return": total / jnp.maximum(count, 1), "episodes": count}

        def iterations_of_a_chunk(carry, scanned):
            n, key = scanned
            return jax.lax.scan(iteration, carry, (n, *draw_chunk(env, sizes, chunk, key)))

        numbers = jnp.arange(iterations).reshape(-1, chunk)
        keys = jax.random.split(key, iterations // chunk)
        carry = (state, jnp.zeros(sizes.num_envs))
        (state, _), curve = jax.lax.scan(iterations_of_a_chunk, carry, (numbers, keys))
        return state.params, jax.tree.map(jnp.ravel, curve)

    return train


def check_sizes(sizes: Sizes) -> None:
    fitting = [n for n in range(1, sizes.train_frequency + 1) if sizes.train_frequency % n == 0]
    if sizes.num_envs not in fitting:
        legal = f"{', '.join(map(str, fitting))}, the divisors of train_frequency"
        raise ValueError(f"num_envs = {sizes.num_envs}; legal: {legal}: intervals count steps of all environments")
    for name, value, divisor in (
        ("target_frequency", sizes.target_frequency, sizes.train_frequency),
        ("buffer_size", sizes.buffer_size, sizes.train_frequency),
    ):
        if value % divisor:
            raise ValueError(
                f"{name} = {value} must be a multiple of {divisor}: intervals count steps of all environments"
            )
    if sizes.total_steps < sizes.train_frequency or sizes.total_steps <= sizes.learning_starts:
        legal = (
            f"more than learning_starts = {sizes.learning_starts}, before which nothing is learned, and at least "
            f"train_frequency = {sizes.train_frequency}"
        )
        raise ValueError(f"total_steps = {sizes.total_steps}; legal: {legal}")
    length = sizes.train_frequency // sizes.num_envs
    if sizes.n_step > length:
        legal = f"at most train_frequency / num_envs = {length}, the steps of each environment between trainings"
        raise ValueError(f"n_step = {sizes.n_step}; legal: {legal}")


def exploration_epsilon(hyper: Hyperparams, n, iterations: int):
    """Probability of a uniform action in iteration n: decreases linearly from 1 to `final_epsilon`."""
    decrease = (1.0 - hyper.final_epsilon) * n / (hyper.exploration_fraction * iterations)
    return jnp.maximum(1.0 - decrease, hyper.final_epsilon)


def draw_chunk(env: Env, sizes: Sizes, chunk: int, key) -> tuple:
    """The random numbers of `chunk` iterations: of the steps, and of the transitions drawn from the buffer."""
    length = sizes.train_frequency // sizes.num_envs
    noise_key, replay_key = jax.random.split(key)
    noise = draw_noise(env, noise_key, sizes.num_envs, chunk * length)
    noise = jax.tree.map(lambda x: x.reshape(chunk, length, *x.shape[1:]), noise)
    bits = jax.random.bits(replay_key, (chunk, sizes.gradient_steps, sizes.batch_size))
    return noise, bits


def empty_buffer(observations, size: int) -> replay.ReplayBuffer:
    """A replay buffer of transitions between observations like these [N ...]."""
    observation = jax.ShapeDtypeStruct(observations.shape[1:], observations.dtype)
    action = jax.ShapeDtypeStruct((), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return replay.init_buffer(Transition(observation, action, number, observation, number, number), size)


def init_params(env: Env, key, widths: tuple[int, ...] = (120, 84)) -> Params:
    """Parameters of the network: to be made outside of what is compiled.

    Raises ValueError for an environment with continuous actions.
    """
    if isinstance(env.actions, Box):
        raise ValueError("deep Q-learning takes the best of finitely many actions; this environment's are continuous")
    observation = jax.eval_shape(env.reset, key, env.params)[0]
    return mlp.init_q(key, observation.shape[0], env.actions, widths)


def make_play(env: Env, max_steps: int = 500) -> Callable:
    """play(params, key, num_episodes) -> Trajectory of whole episodes, with the best action at each step."""

    def play(params: Params, key, num_episodes: int) -> Trajectory:
        return episodes(env, mlp.act_epsilon_greedily, (params, 0.0), key, num_episodes, max_steps)

    return play
