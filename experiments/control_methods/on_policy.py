"""Whole training runs of REINFORCE, VPG, TRPO, PPO and V-trace, with the credit and losses of the language models.

A `Method` is a value: how decisions are collected, and what is learned from them. `make_train(env, method, sizes)`
makes the run, one function to be compiled. A method of your own is another value: docs/control.md has an example.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from rljax.types import Algorithm, Params, TrainState, Trajectory


class Hyperparams(NamedTuple):
    """Traced: another value needs no other compilation."""

    learning_rate: float = 1e-3  # of all parameters, or of the actor alone where the critic is fitted separately
    critic_learning_rate: float = 3e-3  # of a critic that is fitted separately
    gamma: float = 0.99  # discount
    lam: float = 0.95  # λ of generalized advantage estimation
    entropy_coefficient: float = 0.01  # of the entropy bonus
    clip_range: float = 0.2  # of PPO's ratio
    delta: float = 0.01  # TRPO's bound on the mean KL of a policy step, nats
    damping: float = 0.1  # of TRPO's Fisher matrix


class Sizes(NamedTuple):
    """Static: another value compiles another program."""

    total_steps: int = 150_000  # of all environments together; of whole episodes also the columns after their ends
    num_envs: int = 16  # environments at once
    num_steps: int = 128  # steps of each environment in a rollout; longest episode where whole episodes are collected
    epochs: int = 4  # passes over the decisions of a rollout; vpg, trpo: passes of the critic
    minibatches: int = 4  # updates per pass
    anneal_learning_rate: bool = True  # ppo, ppo_penalty, vtrace: the learning rate decreases linearly to 0
    value_clip: float | None = 0.2  # of PPO's critic
    actor_lag: int = 1  # rollouts before the acting policy is replaced by the newest one
    kl_direction: str = "old_new"  # of TRPO's bound: KL(old ‖ new), or new_old

    @property
    def num_rollouts(self) -> int:
        return self.total_steps // (self.num_envs * self.num_steps)


class Learner(NamedTuple):
    """The algorithm of a run, and the updates that follow each rollout."""

    algorithm: Algorithm
    learn: Callable  # (state, batch) -> (state, metrics): all updates of one rollout
    init_opt_state: Callable  # (params) -> optimizer state
    coefficients: dict = {}  # noqa: RUF012  the first values of coefficients that change during the run


class Collector(NamedTuple):
    """What collecting carries from one rollout to the next."""

    envs: Any  # observations and states of the environments
    running_return: jax.Array  # [N] rewards so far of the episodes that have not ended
    actor: Params  # parameters of the policy that acts


class Rollout(NamedTuple):
    traj: Trajectory
    collector: Collector
    total_return: jax.Array  # of all episodes that ended in this rollout
    num_episodes: Any  # that ended in this rollout


# ----------------------------------------------------------------------------------------------------------- rollouts


def collect_steps(env: Env, sizes: Sizes, params: Params, collector: Collector, key) -> Rollout:
    """`num_steps` further steps of each environment, and values by `params`; episodes continue in the next rollout."""
    noise = draw_noise(env, key, sizes.num_envs, sizes.num_steps, num_draws(env))
    envs, traj = unroll(env, mlp.act, collector.actor, noise, collector.envs)
    total_return, num_episodes, running_return = episode_returns(traj, collector.running_return)
    collector = collector._replace(envs=envs, running_return=running_return)
    return Rollout(mlp.annotate(params, traj), collector, total_return, num_episodes)


def collect_episodes(env: Env, sizes: Sizes, params: Params, collector: Collector, key) -> Rollout:
    """One whole episode of each environment, of at most `num_steps` steps, without values."""
    del params
    traj = episodes(env, mlp.act, collector.actor, key, sizes.num_envs, sizes.num_steps, num_draws(env))
    return Rollout(traj, collector, traj.rewards.sum(), sizes.num_envs)


def num_draws(env: Env) -> int:
    """Random numbers that the policy needs for one action."""
    return len(env.actions.low) if isinstance(env.actions, Box) else 1


# ----------------------------------------------------------------------------------------------------------- learners


def adam(learning_rate, max_grad_norm: float = 0.5) -> optax.GradientTransformation:
    """Adam on one flat vector: on a CPU, twelve small arrays cost more in calls than in arithmetic."""
    clip = optax.clip_by_global_norm(max_grad_norm)
    return optax.flatten(optax.chain(clip, optax.adam(learning_rate, eps=1e-5)))


def adam_update(algorithm: Algorithm, optimizer: optax.GradientTransformation) -> Callable:
    """(state, batch) -> (state, metrics): one gradient step on the algorithm's loss."""
    return make_update(policy_objective(mlp.make_mlp_policy(), algorithm), optimizer)


def joint_learner(algorithm: Algorithm, sizes: Sizes, hyper: Hyperparams) -> Learner:
    """Actor and critic trained together, in minibatches of shuffled decisions.

    Raises ValueError for several updates of a rollout by a method that has no ratio to the policy before them.
    """
    if algorithm.one_update and (sizes.epochs, sizes.minibatches) != (1, 1):
        asked = f"epochs x minibatches = {sizes.epochs} x {sizes.minibatches}"
        raise ValueError(
            f"this algorithm is right for one update of a rollout, on all decisions: {asked}; legal: 1 x 1"
        )
    algorithm = with_entropy(algorithm, hyper.entropy_coefficient)
    num_updates = sizes.num_rollouts * sizes.epochs * sizes.minibatches
    learning_rate = hyper.learning_rate
    if sizes.anneal_learning_rate:
        learning_rate = optax.linear_schedule(hyper.learning_rate, 0.0, num_updates)
    optimizer = adam(learning_rate)
    update = adam_update(algorithm, optimizer)
    keep = ("entropy", "kl_behavior", "value_loss")

    def learn(state: TrainState, batch):
        return scan_updates(update, state, flatten_time(batch), sizes.epochs, sizes.minibatches, keep)

    return Learner(algorithm, learn, optimizer.init)


def critic_loss(output, batch):
    return losses.value_loss(output.values, batch.returns), {}


CRITIC = Algorithm(None, critic_loss, token_mean)


def separate_critic_learner(
    algorithm: Algorithm,
    sizes: Sizes,
    hyper: Hyperparams,
    policy_update: Callable | None = None,
    keep: tuple[str, ...] = ("entropy",),
) -> Learner:
    """One policy step on the whole rollout, then the critic's own epochs.

    policy_update: (state, batch) -> (state, metrics); default: a step of Adam. keep: metrics of the policy step.
    """
    optimizers = {"actor": adam(hyper.learning_rate), "critic": adam(hyper.critic_learning_rate)}
    policy_update = policy_update or adam_update(algorithm, optimizers["actor"])
    policy_step = update_subtree(policy_update, "actor")
    critic_step = update_subtree(adam_update(CRITIC, optimizers["critic"]), "critic")

    def learn(state: TrainState, batch):
        state, metrics = policy_step(state, batch)
        if "values" in algorithm.needs:
            state, _ = scan_updates(critic_step, state, flatten_time(batch), sizes.epochs, sizes.minibatches)
        return state, {name: metrics[name] for name in keep}

    def init_opt_state(params: Params):
        return {name: optimizer.init({name: params[name]}) for name, optimizer in optimizers.items()}

    return Learner(algorithm, learn, init_opt_state)


def ppo_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    algorithm = ppo(hyper.clip_range, hyper.clip_range, hyper.gamma, hyper.lam, value_clip=sizes.value_clip)
    return joint_learner(algorithm, sizes, hyper)


def ppo_penalty_learner(sizes: Sizes, hyper: Hyperparams, target_kl: float = 0.003) -> Learner:
    """PPO with an exact KL penalty. After each rollout its coefficient moves towards `target_kl` nats a decision."""
    algorithm = ppo_penalty(gamma=hyper.gamma, lam=hyper.lam, value_clip=sizes.value_clip)
    learner = joint_learner(algorithm, sizes, hyper)

    def learn(state: TrainState, batch):
        state, metrics = learner.learn(state, batch)
        kl = mlp.make_mlp_policy()(state.params, {}, batch.traj).kl.mean()
        coefficient = ppo_penalty_coefficient(state.coefficients["kl_old"], kl, target_kl)
        state = state.replace(coefficients={"kl_old": coefficient})
        return state, {**metrics, "kl_old": kl, "kl_coefficient": coefficient}

    return learner._replace(learn=learn, coefficients={"kl_old": jnp.float32(1.0)})


def trpo_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    """A policy step within `delta` of the policy that acted, without entropy bonus or clipping; a separate critic."""
    algorithm = trpo_gae(hyper.gamma, hyper.lam)
    objective = policy_objective(mlp.make_mlp_policy(), algorithm)
    divergence = mlp.make_mlp_divergence(sizes.kl_direction)
    update = make_trust_region_update(objective, divergence, hyper.delta, hyper.damping)
    keep = ("entropy", "kl_step", "accepted", "line_search_trials")
    return separate_critic_learner(algorithm, sizes, hyper, update, keep)


def policy_gradient_learner(algorithm: Algorithm, sizes: Sizes, hyper: Hyperparams) -> Learner:
    """One step of Adam a rollout, with an entropy bonus; a separate critic if the algorithm needs one."""
    return separate_critic_learner(with_entropy(algorithm, hyper.entropy_coefficient), sizes, hyper)


def vpg_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return policy_gradient_learner(vpg(hyper.gamma, hyper.lam, value_coefficient=0.0), sizes, hyper)


def vtrace_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return joint_learner(vtrace(hyper.gamma, hyper.lam), sizes, hyper)


def off_policy_pg_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return policy_gradient_learner(off_policy_pg(baseline=batch_mean_baseline), sizes, hyper)


def reinforce_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return policy_gradient_learner(reinforce(no_baseline), sizes, hyper)


def reinforce_to_go_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return policy_gradient_learner(reinforce_to_go(no_baseline, hyper.gamma), sizes, hyper)


def reinforce_baseline_learner(sizes: Sizes, hyper: Hyperparams) -> Learner:
    return policy_gradient_learner(reinforce_to_go(leave_one_out_baseline, hyper.gamma), sizes, hyper)


# ------------------------------------------------------------------------------------------------------------ methods


class Method(NamedTuple):
    """How decisions are collected, and what is learned from them."""

    make_learner: Callable[[Sizes, Hyperparams], Learner]
    collect: Callable[..., Rollout] = collect_steps  # or collect_episodes, where whole episodes are credited


PPO = Method(ppo_learner)
PPO_PENALTY = Method(ppo_penalty_learner)
TRPO = Method(trpo_learner)
VPG = Method(vpg_learner)
VTRACE = Method(vtrace_learner)
OFF_POLICY_PG = Method(off_policy_pg_learner, collect_episodes)
REINFORCE = Method(reinforce_learner, collect_episodes)
REINFORCE_TO_GO = Method(reinforce_to_go_learner, collect_episodes)
REINFORCE_BASELINE = Method(reinforce_baseline_learner, collect_episodes)


# ---------------------------------------------------------------------------------------------------------------- run


def make_train(env: Env, method: Method, sizes: Sizes) -> Callable:
    """train(params, key, hyper) -> (params, curve).

    curve: metrics, a number for each rollout. `return` is the mean over the episodes that ended in the rollout,
    `episodes` their number.

    Raises ValueError where `total_steps` are less than one rollout.
    """
    if sizes.num_rollouts < 1:
        rollout = f"{sizes.num_envs} x {sizes.num_steps} = {sizes.num_envs * sizes.num_steps}"
        raise ValueError(f"total_steps = {sizes.total_steps} are less than one rollout; legal: at least {rollout}")

    def train(params: Params, key, hyper: Hyperparams):
        learner = method.make_learner(sizes, hyper)
        reset_key, learner_key, key = jax.random.split(key, 3)
        collector = Collector(reset_envs(env, reset_key, sizes.num_envs), jnp.zeros(sizes.num_envs), params)
        opt_state = learner.init_opt_state(params)
        state = TrainState(
            jnp.int32(0), params, opt_state, learner_key, coefficients=learner.coefficients, extra=collector
        )

        def iteration(state: TrainState, scanned):
            n, key = scanned
            collector = state.extra._replace(actor=acting_params(state, n, sizes.actor_lag))
            rollout = method.collect(env, sizes, state.params, collector, key)
            traj = rollout.traj
            if "old_logp" in learner.algorithm.needs:
                traj = traj.replace(old_logp=mlp.make_mlp_policy()(state.params, {}, traj).logp)
            batch = learner.algorithm.credit(traj, state.coefficients)
            state, metrics = learner.learn(state.replace(extra=rollout.collector), batch)
            mean_return = rollout.total_return / jnp.maximum(rollout.num_episodes, 1)
            return state, {"return": mean_return, "episodes": rollout.num_episodes, **metrics}

        scanned = (jnp.arange(sizes.num_rollouts), jax.random.split(key, sizes.num_rollouts))
        state, curve = jax.lax.scan(iteration, state, scanned)
        return state.params, curve

    return train


def acting_params(state: TrainState, n, lag: int) -> Params:
    """Parameters that act in rollout n: the newest ones, or with a lag those of a rollout before."""
    if lag == 1:
        return state.params
    return polyak_update(state.extra.actor, state.params, due=n % lag == 0)


def init_params(env: Env, key, width: int = 64, activation: Callable = jnp.tanh) -> Params:
    """Parameters of actor and critic: to be made outside of what is compiled."""
    observation = jax.eval_shape(env.reset, key, env.params)[0]
    continuous = isinstance(env.actions, Box)
    actions = len(env.actions.low) if continuous else env.actions
    return mlp.init(key, observation.shape[0], actions, width, continuous, activation)


def make_play(env: Env, max_steps: int = 500) -> Callable:
    """play(params, key, num_episodes) -> Trajectory of whole episodes, with the most likely action at each step."""

    def play(params: Params, key, num_episodes: int) -> Trajectory:
        return episodes(env, mlp.act_greedily, params, key, num_episodes, max_steps)

    return play


def final_return(curve: dict):
    """Mean return of the episodes that ended in the last tenth of a run; NaN where none did."""
    n = max(len(curve["return"]) // 10, 1)
    num_episodes = curve["episodes"][-n:]
    total = (curve["return"][-n:] * num_episodes).sum()
    count = num_episodes.sum()
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
