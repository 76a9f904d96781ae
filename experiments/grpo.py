r"""GRPO on any Hugging Face model directory and any jsonl of prompts.

    python experiments/grpo.py --model DIR --prompts experiments/story_openings.jsonl \
        --rewards animals --sampling.max_tokens 128
    python experiments/grpo.py --model DIR --prompts gsm8k_train.jsonl --template "{question}\n" \
        --rewards number think=0.1 --algorithm gdpo

The reward is a weighted sum of verifiers, functions (completion, columns of the prompt) -> number: rljax/rewards/, or
your own in VERIFIERS. They run in worker processes under a deadline. The reference of the KL term is the model as it
was at the start, unless --weights.ref_sync_steps is set. --algorithm takes every critic-free one of rljax/algorithms/
by name; for one of your own call main(cfg, algorithm=with_kl(mine())). The same command resumes a run.

Reached: stories260k, animals, seeds 0 1 2: eval reward 0.173 0.206 0.211 -> 0.457 0.409 0.483 (256 completions)
at a KL to the start of 3.6 2.2 3.4 nats a sequence, in 143 115 124 s on 2 shared Xeon cores.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import optax

from experiments.common import command_line, controllers, difficulty, models, runs, settings, train
from experiments.common.algorithms import PER_STEP, CriticFree, critic_free
from experiments.common.controllers import Controllers
from experiments.common.optimizer import make_optimizer
from experiments.common.remote_sampling import connect_server, is_off_policy
from experiments.common.rewards import check_compared_in_training, check_verdicts, load_score, read_rewards
from experiments.common.sampling import initial_extra, make_draw, make_greedy_baseline, training_sampling
from experiments.common.settings import Batches, MeshShape, Optimizer, Rare, Reward, Sampling, Weights
from experiments.common.verifiers import VERIFIERS
from rljax.algorithms import kl_in_reward, with_kl
from rljax.models import decoder, policy
from rljax.models.decoder import DecoderConfig
from rljax.rewards.pool import Pool
from rljax.train.mesh import Shardings, make_mesh, place
from rljax.train.metrics import require_on_policy, rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.update import UpdateFn, learn, make_update
from rljax.types import LM, Algorithm, AnnotateFn, PolicyFn, TrainState

PROGRESS_METRICS = ("reward", "frac_reward_zero_std", "length", "kl_sequence", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Config:
    """GRPO, or another critic-free algorithm, with a KL term, on a pretrained model."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt; FILE=WEIGHT mixes them
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: settings.PromptData = settings.PromptData()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    rewards: tuple[str, ...] = ("number",)  # NAME or NAME=WEIGHT each; see docs/rewards.md
    reward: Reward = Reward()
    algorithm: CriticFree = "grpo"  # how to learn
    seed: int = 0  # of the order of prompts and of sampling
    steps: int = 20  # steps: sample, score, update
    kl_coef: float = 0.04  # coefficient of the KL to the reference
    kl_in_reward: Rare[bool] = False  # the KL is in the rewards (RLOO, ReMax, REINFORCE++), not in the loss
    controllers: Controllers = Controllers()
    batches: Batches = Batches(prompts=16, num_generations=8)
    sampling: Sampling = Sampling(max_tokens=128)
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    server: settings.Server = settings.Server()
    eval_prompts: int = 32  # prompts held out for evaluation
    eval_samples: Rare[int] = 256  # completions to these in each evaluation
    eval_every: Rare[int] = 0  # steps between evaluations, the best model is kept; 0: before and after training only
    save_every: Rare[int] = 20  # steps between checkpoints
    log_samples_every: Rare[int] = 10  # steps between samples in the report
    directory: str = ""  # of the run; default runs/grpo/ALGORITHM-MODEL-PROMPTS-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config, algorithm: Algorithm | None = None, verifiers: dict = VERIFIERS) -> dict[str, dict[str, float]]:
    """Train; return reward and KL on the eval prompts before and after.

    `algorithm` replaces the one that cfg names, its KL term included.
    """
    train.check_directory(cfg.directory, algorithm)
    name = cfg.algorithm if algorithm is None else ""
    algorithm = algorithm or named_algorithm(cfg)
    check_compared_in_training(cfg, algorithm.needs)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward, per_step=cfg.algorithm in PER_STEP)
    cfg = runs.checked(cfg, algorithm.least_group)
    batches = cfg.batches
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_batches(batches, mesh, carries_over=True)
    train.check_algorithm(algorithm, batches, name, is_off_policy(cfg.server))
    check_verdicts(rewards, algorithm, cfg.data)
    controllers.check_target(cfg.controllers, cfg.server)

    # -- model and data
    tokenizer, train_prompts, eval_prompts = runs.read_data(cfg, rewards.verifiers)
    context = max(train_prompts.length, eval_prompts.length) + cfg.sampling.max_tokens
    # frozen: the reference of the KL term, and with an adapter the model under it
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context, cfg.seed)
    algorithm = with_settings(algorithm, cfg, config, is_off_policy(cfg.server))
    sampling = training_sampling(cfg.sampling, batches.num_generations, tokenizer, config.vocab_size)

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    extra = initial_extra(cfg.data, batches, train_prompts, sampling)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen, extra=extra)
    state = state.replace(coefficients=controllers.initial_coefficients(cfg.controllers, cfg.kl_coef, cfg.kl_in_reward))
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    sizes = (batches, shardings, config, train_prompts.length, cfg.sampling.max_tokens)
    lm, model, annotate, annotate_eval, keep, credit, update = make_step(algorithm, optimizer, *sizes)
    per_token = train.make_token_columns(model, *sizes)
    remote = connect_server(cfg, config, per_token)
    draw = make_draw(lm, train_prompts, batches, sampling, shardings, cfg.seed, cfg.data, remote)

    # -- the loop
    run = runs.make_run(cfg, __file__, cfg.algorithm, algorithm, rewards.verifiers, PROGRESS_METRICS)
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, run.directory)
        fill_baseline = make_greedy_baseline(lm, algorithm, score, batches, sampling, shardings)
        evaluation = (eval_prompts, sampling, cfg.eval_samples, cfg.seed, batches, shardings)
        evaluate = train.make_evaluate(lm, annotate_eval, score, *evaluation)
        state = place(state, shardings.state, donate=True)
        train.check_batch_invariance(config, lm, model, state)
        draw, score, update, evaluate = run.timed(sample=draw, score=score, update=update, eval=evaluate)
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            traj, prompts, state = draw(state, step)
            traj = fill_baseline(state, score(annotate(state, traj), prompts), prompts)
            state, pass_rates = difficulty.after_scores(cfg.data, state, traj, prompts, train_prompts)
            batch = credit(keep(traj), controllers.applied_coefficients(cfg.controllers, state.coefficients))
            state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches, at_old_policy=True)
            if run.is_first_step(step) and not (batches.carry_over and step):  # what is carried over is off-policy
                require_on_policy(metrics, train.on_policy_tolerance(config, cfg.server))
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            state = models.sync_reference(state, cfg.weights)
            if run.should_log_samples(step):
                run.log_samples(step, batch, tokenizer.decode, score.names, prompts, per_token(state, batch.traj))
            metrics = rollout_metrics(traj, score.names) | metrics | pass_rates
            state, metrics = controllers.adapt(cfg.controllers, state, metrics, len(traj.mask))
            metrics |= runs.evaluate_when_due(cfg, run, step, state, config, evaluate)
            run.record(step, state, metrics)
        after = runs.evaluate_at_end(cfg, run, state, config, evaluate)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    return runs.summarize(cfg, before, after, run.directory / "model")


class Step(NamedTuple):
    """The functions of a step, in the order of their use; experiments/preflight.py compiles the same."""

    lm: LM  # that is sampled from
    model: PolicyFn
    annotate: AnnotateFn  # reference log-probs, and what else the algorithm needs
    annotate_eval: AnnotateFn  # reference log-probs alone
    keep: Callable  # all rows unless batches.oversample > 1
    credit: Callable  # advantages
    update: UpdateFn


def make_step(
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    shardings: Shardings,
    config: DecoderConfig,
    prompt_tokens: int,
    max_tokens: int,
) -> Step:
    """The functions of a step, for prompts and completions of at most so many tokens."""
    sizes = (batches, shardings, config, prompt_tokens, max_tokens)
    model = policy.make_policy(config)
    # ref_logp: the KL to the reference is always logged
    annotates = train.make_annotates(model, (*algorithm.needs, "ref_logp"), *sizes)
    keep = train.make_keep(algorithm, batches)
    credit = jax.jit(algorithm.credit)
    make = partial(make_update, policy_objective(model, algorithm), optimizer, shardings=shardings)
    return Step(decoder.language_model(config), model, *annotates, keep, credit, train.cut_update(make, *sizes))


def with_settings(algorithm: Algorithm, cfg: Config, config: DecoderConfig, other: bool = False) -> Algorithm:
    """The algorithm with controlled terms, filtered groups and old log-probs, as settings and sampler ask."""
    algorithm = controllers.with_controlled_terms(algorithm, cfg.controllers)
    algorithm = train.with_filtered_groups(algorithm, cfg.batches)
    return train.with_own_old_logp(algorithm, config, cfg.batches.carry_over, other)


def named_algorithm(cfg: Config) -> Algorithm:
    """The algorithm that cfg names, with the KL to the reference in its loss or in its reward."""
    algorithm = (critic_free(cfg.sampling.max_tokens) | PER_STEP)[cfg.algorithm]()
    return kl_in_reward(algorithm, cfg.kl_coef) if cfg.kl_in_reward else with_kl(algorithm, cfg.kl_coef)


if __name__ == "__main__":
    command_line.run(Config, main)
