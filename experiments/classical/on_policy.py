"""REINFORCE, VPG, TRPO, PPO, V-trace for control: the language model's credit, losses, updates in one compiled run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rljax.algorithms import (
    off_policy_pg,
    ppo,
    ppo_penalty,
    reinforce,
    reinforce_to_go,
    trpo_gae,
    vpg,
    vtrace,
    with_entropy,
)
from rljax.algorithms.common.controllers import ppo_penalty_coefficient
from rljax.algorithms.reinforce import batch_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.envs.env import Box, Env
from rljax.models import mlp
from rljax.ops import losses
from rljax.ops.weights import token_mean
from rljax.rollouts.episodes import episodes
from rljax.rollouts.unroll import draw_noise, episode_returns, reset_envs, unroll
from rljax.train.compiled import flatten_time, polyak_update, scan_updates, update_subtree
from rljax.train.objective import policy_objective
from rljax.train.trust_region import make_trust_region_update
from rljax.train.update import make_update
from rljax.types import Algorithm, TrainState


class Hyper(NamedTuple):
    """Traced: other values need no other compilation."""

    learning_rate: float = 1e-3  # of all parameters, or of the actor
    critic_rate: float = 3e-3  # of the critic, where it is fitted apart
    gamma: float = 0.99
    lam: float = 0.95  # of GAE
    entropy: float = 0.01  # coefficient of the bonus
    clip: float = 0.2  # of PPO's ratio
    delta: float = 0.01  # TRPO's bound on the mean KL of a policy step, nats
    damping: float = 0.1  # of its Fisher matrix


class Sizes(NamedTuple):
    """Of a run: not traced."""

    steps: int = 150_000  # of the environments, in all
    rows: int = 16  # environments at once
    length: int = 128  # steps of each before an update; reinforce: of an episode
    epochs: int = 4  # passes over the decisions of a rollout; vpg, trpo: of the critic
    minibatches: int = 4  # updates a pass
    anneal: bool = True  # the learning rate of ppo, ppo_penalty, vtrace falls to 0
    value_clip: float | None = 0.2  # of PPO's critic
    lag: int = 1  # rollouts by one policy before a newer one acts; 1: always the newest
    kl_direction: str = "old_new"  # of TRPO's bound


class Method(NamedTuple):
    """What tells the algorithms apart."""

    algorithm: Algorithm
    learn: Callable  # (state, batch) -> (state, metrics): the updates of one rollout
    opt_state: Callable  # (params) -> the optimizer's first state
    coefficients: dict = {}  # noqa: RUF012  the first ones


CRITIC = Algorithm(None, lambda out, batch: (losses.value_loss(out.values, batch.returns), {}), token_mean)


def adam(rate, clip_norm: float = 0.5) -> optax.GradientTransformation:
    """On one flat vector: on CPU, twelve small arrays cost more in calls than in arithmetic."""
    return optax.flatten(optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(rate, eps=1e-5)))


def updating(algorithm: Algorithm, optimizer) -> Callable:
    return make_update(policy_objective(mlp.make_mlp_policy(), algorithm), optimizer)


def in_minibatches(algorithm: Algorithm, sizes: Sizes, h: Hyper, iterations: int) -> Method:
    """Actor and critic together, in minibatches of shuffled decisions."""
    algorithm = with_entropy(algorithm, h.entropy)
    updates = iterations * sizes.epochs * sizes.minibatches
    optimizer = adam(optax.linear_schedule(h.learning_rate, 0.0, updates) if sizes.anneal else h.learning_rate)
    update, keep = updating(algorithm, optimizer), ("entropy", "kl_behavior", "value_loss")

    def learn(state, batch):
        return scan_updates(update, state, flatten_time(batch), sizes.epochs, sizes.minibatches, keep)

    return Method(algorithm, learn, optimizer.init)


def penalised(sizes: Sizes, h: Hyper, iterations: int, target: float = 0.003) -> Method:
    """PPO with an exact KL penalty, its coefficient moved towards `target` nats a decision after each rollout."""
    algorithm = ppo_penalty(gamma=h.gamma, lam=h.lam, value_clip=sizes.value_clip)
    method = in_minibatches(algorithm, sizes, h, iterations)

    def learn(state, batch):
        state, metrics = method.learn(state, batch)
        kl = mlp.make_mlp_policy()(state.params, {}, batch.traj).kl.mean()
        beta = ppo_penalty_coefficient(state.coefficients["kl_old"], kl, target)
        return state.replace(coefficients={"kl_old": beta}), {**metrics, "kl_old": kl, "kl_coefficient": beta}

    return method._replace(learn=learn, coefficients={"kl_old": jnp.float32(1.0)})


def apart(
    algorithm: Algorithm, sizes: Sizes, h: Hyper, policy_update: Callable | None = None, keep: tuple = ("entropy",)
) -> Method:
    """A policy step on the whole batch, Adam's or `policy_update`, then the critic's own epochs."""
    actor, critic = adam(h.learning_rate), adam(h.critic_rate)
    policy_step = update_subtree(policy_update or updating(algorithm, actor), "actor")
    critic_step = update_subtree(updating(CRITIC, critic), "critic")

    def learn(state, batch):
        state, metrics = policy_step(state, batch)
        if "values" in algorithm.needs:
            state, _ = scan_updates(critic_step, state, flatten_time(batch), sizes.epochs, sizes.minibatches)
        return state, {name: metrics[name] for name in keep}

    def opt_state(params):
        both = {"actor": actor, "critic": critic}
        return {name: optimizer.init({name: params[name]}) for name, optimizer in both.items()}

    return Method(algorithm, learn, opt_state)


def trust_region(sizes: Sizes, h: Hyper) -> Method:
    """TRPO: the actor within `delta` of the one that acted, no bonus and no clip; the critic apart."""
    algorithm = trpo_gae(h.gamma, h.lam)
    objective = policy_objective(mlp.make_mlp_policy(), algorithm)
    update = make_trust_region_update(objective, mlp.make_mlp_divergence(sizes.kl_direction), h.delta, h.damping)
    return apart(algorithm, sizes, h, update, ("entropy", "kl_step", "accepted", "line_search_trials"))


def by_adam(algorithm: Algorithm, sizes: Sizes, h: Hyper) -> Method:
    """One step of the policy a rollout, with the bonus for entropy."""
    return apart(with_entropy(algorithm, h.entropy), sizes, h)


def clipped(sizes: Sizes, h: Hyper, iterations: int) -> Method:
    algorithm = ppo(h.clip, h.clip, h.gamma, h.lam, value_clip=sizes.value_clip)
    return in_minibatches(algorithm, sizes, h, iterations)


METHODS: dict[str, Callable] = {  # (sizes, hyper, iterations) -> Method
    "ppo": clipped,
    "ppo_penalty": penalised,
    "trpo": lambda sizes, h, _: trust_region(sizes, h),
    "vpg": lambda sizes, h, _: by_adam(vpg(h.gamma, h.lam, value_coefficient=0.0), sizes, h),
    "vtrace": lambda sizes, h, iterations: in_minibatches(vtrace(h.gamma, h.lam), sizes, h, iterations),
    "off_policy_pg": lambda sizes, h, _: by_adam(off_policy_pg(baseline=batch_mean_baseline), sizes, h),
    "reinforce": lambda sizes, h, _: by_adam(reinforce(no_baseline), sizes, h),
    "reinforce_to_go": lambda sizes, h, _: by_adam(reinforce_to_go(no_baseline, h.gamma), sizes, h),
    "reinforce_baseline": lambda sizes, h, _: by_adam(reinforce_to_go(leave_one_out_baseline, h.gamma), sizes, h),
}
REINFORCE = ("reinforce", "reinforce_to_go", "reinforce_baseline")
EPISODIC = (*REINFORCE, "off_policy_pg")  # credit whole episodes, one a row; the others pieces of fixed length


def make_train(algo: str, env: Env, sizes: Sizes) -> Callable:
    """train(params, key, hyper) -> (params, curve): curve holds a number for each rollout.

    `return`: mean over the episodes that ended in it, weighted by `episodes`, their number. Raises ValueError for fewer
    steps than one rollout has, and for an algorithm that is none.
    """
    if algo not in METHODS:
        raise ValueError(f"no algorithm {algo!r}; legal: {', '.join(METHODS)}")
    iterations = sizes.steps // (sizes.rows * sizes.length)
    if iterations < 1:
        rollout = f"{sizes.rows} x {sizes.length} = {sizes.rows * sizes.length}"
        raise ValueError(f"steps = {sizes.steps} are less than one rollout; legal: at least {rollout}")
    draws = len(env.actions.low) if isinstance(env.actions, Box) else 1

    def train(params, key, hyper: Hyper):
        method = METHODS[algo](sizes, hyper, iterations)
        starting, learning, key = jax.random.split(key, 3)
        extra = (reset_envs(env, starting, sizes.rows), jnp.zeros(sizes.rows), params)
        state = TrainState(jnp.int32(0), params, method.opt_state(params), learning, {}, 0, method.coefficients, extra)

        def rollout(state, key):
            carry, running, acting = state.extra
            if algo in EPISODIC:
                traj = episodes(env, mlp.act, acting, key, sizes.rows, sizes.length, draws)
                return traj, state.extra, (traj.rewards.sum(), sizes.rows)
            carry, traj = unroll(env, mlp.act, acting, draw_noise(env, key, sizes.rows, sizes.length, draws), carry)
            total, count, running = episode_returns(traj, running)
            return mlp.annotate(state.params, traj), (carry, running, acting), (total, count)

        def iteration(state, now):
            n, key = now
            acting = (
                polyak_update(state.extra[-1], state.params, due=n % sizes.lag == 0) if sizes.lag > 1 else state.params
            )
            state = state.replace(extra=(*state.extra[:-1], acting))
            traj, extra, (total, count) = rollout(state, key)
            if "old_logp" in method.algorithm.needs:
                traj = traj.replace(old_logp=mlp.make_mlp_policy()(state.params, {}, traj).logp)
            batch = method.algorithm.credit(traj, state.coefficients)
            state, metrics = method.learn(state.replace(extra=extra), batch)
            return state, {"return": total / jnp.maximum(count, 1), "episodes": count, **metrics}

        state, curve = jax.lax.scan(iteration, state, (jnp.arange(iterations), jax.random.split(key, iterations)))
        return state.params, curve

    return train


def init(env: Env, key, width: int = 64, activation: Callable = jnp.tanh):
    """Parameters of actor and critic: to be made outside of what is compiled."""
    observation = jax.eval_shape(env.reset, key, env.params)[0]
    continuous = isinstance(env.actions, Box)
    actions = len(env.actions.low) if continuous else env.actions
    return mlp.init(key, observation.shape[0], actions, width, continuous, activation)


def play_greedily(env: Env, length: int = 500) -> Callable:
    """play(params, key, rows) -> Trajectory of fresh episodes, the likeliest action taken throughout."""
    return lambda params, key, rows: episodes(env, mlp.act_greedily, params, key, rows, length)


def last_tenth(curve: dict):
    """Mean return of the episodes that ended in the last tenth of the rollouts; NaN where none did."""
    n = max(len(curve["return"]) // 10, 1)
    total, count = curve["return"][-n:] * curve["episodes"][-n:], curve["episodes"][-n:]
    return jnp.where(count.sum() > 0, total.sum() / jnp.maximum(count.sum(), 1), jnp.nan)
