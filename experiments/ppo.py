r"""PPO as RLHF uses it: a policy, its frozen reference, a reward model and a critic.

    python experiments/ppo.py --model runs/sft/RUN/model --prompts experiments/story_openings.jsonl \
        --rewards runs/reward_model/RUN/model --critic separate --critic_model runs/reward_model/RUN/model
    python experiments/ppo.py --model DIR --prompts experiments/story_openings.jsonl --rewards animals

A step samples completions; the log-probs and the critic's values of that moment stay fixed while it learns. The reward
of a completion (a reward model's score, or a verifier's) stands on its last token, and each token pays β (log π - log
π_ref): the KL to the model as it was at the start. GAE, with a value of 0 after the last token, gives advantages, which
are whitened over the batch, and targets for the critic. `epochs` passes over shuffled minibatches follow, with clipped
ratios and clipped values. --controllers.kl_target lets β follow the KL (Ziegler et al., arXiv:1909.08593).
DIRECTORY/model is the policy at the end.

Reached: as the last stage of rlhf.py, stories260k, seed 0: reward of a reward model -2.73 -> 2.98 (256 stories) at a
KL of 8.5 nats a sequence, in 40 steps of 64 completions.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax

from experiments.common import command_line, controllers, models, runs, settings, train
from experiments.common.controllers import Controllers
from experiments.common.optimizer import make_actor_critic_optimizer
from experiments.common.rewards import check_compared_in_training, load_score, read_rewards
from experiments.common.sampling import make_draw, training_sampling
from experiments.common.settings import Batches, MeshShape, Optimizer, Rare, Reward, Sampling, Weights
from experiments.common.verifiers import VERIFIERS
from rljax import algorithms as a
from rljax.models import decoder, policy
from rljax.rewards.pool import Pool
from rljax.train.mesh import make_mesh, place
from rljax.train.metrics import credit_metrics, require_on_policy, rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.update import learn, make_update
from rljax.types import Algorithm, TrainState

PROGRESS_METRICS = ("reward", "kl_sequence", "value_loss", "explained_variance", "length", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Ppo:
    """The method's own settings."""

    kl_coef: float = 0.05  # β, of the KL to the reference in the reward; where there is a kl_target, its first value
    lam: float = 0.95  # λ of GAE
    gamma: Rare[float] = 1.0  # discount
    clip: float = 0.2  # range of the ratio around 1
    value_clip: Rare[float] = 0.2  # by which a value may leave the one at sampling time in the critic's loss
    value_coefficient: float = 0.1  # of the critic's loss
    missing_eos_penalty: Rare[float] = 0.0  # taken from the reward of a completion that was cut
    clip_reward: Rare[float] = 0.0  # largest absolute reward of a completion; 0: no limit
    whiten_rewards: Rare[bool] = False  # whiten rewards with their KL, token by token, before GAE


@dataclasses.dataclass(frozen=True)
class Config:
    """PPO with a critic, and the KL to the reference in the reward, on a pretrained model."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt; FILE=WEIGHT mixes them
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: settings.Rows = settings.Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    rewards: tuple[str, ...] = ("number",)  # NAME or NAME=WEIGHT each; see docs/rewards.md
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's decoder, or a decoder of its own
    critic_model: str = ""  # directory of the reward model that a separate critic begins as; default: the policy
    critic_learning_rate: Rare[float] = 0.0  # of the critic; 0: the policy's
    seed: int = 0  # of the order of prompts and of sampling
    steps: int = 20  # steps: sample, score, update
    controllers: Controllers = Controllers()
    batches: Batches = Batches(prompts=64, num_generations=1, epochs=4, minibatches=2)
    sampling: Sampling = Sampling(max_tokens=128)
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_prompts: Rare[int] = 32  # prompts held out for evaluation
    eval_samples: Rare[int] = 256  # completions to these in each evaluation
    eval_every: Rare[int] = 0  # steps between evaluations, the best model is kept; 0: before and after training only
    save_every: Rare[int] = 20  # steps between checkpoints
    log_samples_every: Rare[int] = 10  # steps between samples in the report
    directory: str = ""  # of the run; default runs/ppo/MODEL-PROMPTS-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config, verifiers: dict = VERIFIERS) -> dict[str, dict[str, float]]:
    """Train; return reward and KL on the eval prompts before and after."""
    check_compared_in_training(cfg)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    cfg = runs.checked(cfg)
    batches = cfg.batches
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_batches(batches, mesh)
    algorithm = controllers.with_controlled_terms(make_algorithm(cfg.ppo), cfg.controllers)
    train.check_algorithm(algorithm, batches, "ppo")

    # -- model, critic and data
    tokenizer, train_prompts, eval_prompts = runs.read_data(cfg, rewards.verifiers)
    context = max(train_prompts.length, eval_prompts.length) + cfg.sampling.max_tokens
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context, cfg.seed)
    params = models.add_critic(params, frozen, config, cfg.critic, cfg.critic_model, mesh)
    algorithm = train.with_own_old_logp(algorithm, config)
    model = policy.make_policy(config)
    sampling = training_sampling(cfg.sampling, batches.num_generations, tokenizer, config.vocab_size)

    # -- training state
    updates = cfg.steps * batches.epochs * batches.minibatches
    critic_learning_rate = cfg.critic_learning_rate or cfg.optimizer.learning_rate
    optimizer = make_actor_critic_optimizer(cfg.optimizer, critic_learning_rate, updates, params)
    coefficients = controllers.initial_coefficients(cfg.controllers, cfg.ppo.kl_coef, kl_in_reward=True)
    key = jax.random.key(cfg.seed)
    state = TrainState(0, params, optimizer.init(params), key, frozen=frozen, coefficients=coefficients)
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    lm = decoder.language_model(config)
    draw = make_draw(lm, train_prompts, batches, sampling, shardings, cfg.seed)
    sizes = (batches, shardings, config, train_prompts.length, cfg.sampling.max_tokens)
    annotate, annotate_eval = train.make_annotates(model, algorithm.needs, *sizes)  # values, reference log-probs
    credit = jax.jit(algorithm.credit)  # KL in the reward, GAE, whitening
    make = partial(make_update, policy_objective(model, algorithm), optimizer, shardings=shardings)
    update = train.cut_update(make, *sizes)
    per_token = train.make_token_columns(model, *sizes)
    run = runs.make_run(cfg, __file__, "", algorithm, rewards.verifiers, PROGRESS_METRICS)

    # -- the loop
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, run.directory)
        evaluation = (eval_prompts, sampling, cfg.eval_samples, cfg.seed, batches, shardings)
        evaluate = train.make_evaluate(lm, annotate_eval, score, *evaluation)
        state = place(state, shardings.state, donate=True)
        draw, score, update, evaluate = run.timed(sample=draw, score=score, update=update, eval=evaluate)
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            traj, prompts, state = draw(state, step)
            traj = score(annotate(state, traj), prompts)
            batch = credit(traj, controllers.applied_coefficients(cfg.controllers, state.coefficients))
            state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches, at_old_policy=True)
            if run.is_first_step(step):
                require_on_policy(metrics, train.on_policy_tolerance(config))
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            state = models.sync_reference(state, cfg.weights)
            if run.should_log_samples(step):
                run.log_samples(step, batch, tokenizer.decode, score.names, prompts, per_token(state, batch.traj))
            metrics = rollout_metrics(traj, score.names) | credit_metrics(batch) | metrics
            state, metrics = controllers.adapt(cfg.controllers, state, metrics, len(traj.mask))
            metrics |= runs.evaluate_when_due(cfg, run, step, state, config, evaluate)
            run.record(step, state, metrics)
        after = runs.evaluate_at_end(cfg, run, state, config, evaluate)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    return runs.summarize(cfg, before, after, run.directory / "model")


def make_algorithm(cfg: Ppo) -> Algorithm:
    """PPO, and from the inside outwards what is done to its rewards: the last wrapper comes first."""
    algorithm = a.ppo(cfg.clip, cfg.clip, cfg.gamma, cfg.lam, cfg.value_coefficient, cfg.value_clip)
    if cfg.whiten_rewards:
        algorithm = a.whiten_rewards(algorithm)
    algorithm = a.kl_in_reward(algorithm, cfg.kl_coef)
    if cfg.clip_reward:
        algorithm = a.clip_reward(algorithm, cfg.clip_reward)
    if cfg.missing_eos_penalty:
        algorithm = a.missing_eos_penalty(algorithm, cfg.missing_eos_penalty)
    return algorithm


if __name__ == "__main__":
    command_line.run(Config, main)
