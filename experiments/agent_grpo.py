r"""GRPO over conversations of several turns: a Hugging Face model uses tools and plays games.

    python experiments/agent_grpo.py --model DIR --environment calculator --prompts gsm8k_train.jsonl
    python experiments/agent_grpo.py --model DIR --environment guess --max_turns 8
    python experiments/agent_grpo.py --model DIR --environment reasoning_gym:chain_sum

--environment: calculator or python (problems of a file, with that tool), maze, guess, gymnasium:ID, reasoning_gym:TASK,
verifiers:TASKSET; for one of your own call main(cfg, environment=NamedEnvironment(env, rows)): docs/agents.md. A
conversation is one row of tokens: the model learns from those that it chose, and reads what the environment wrote. The
reward is what the environment gives, turn by turn. Otherwise this is grpo.py. arithmetic_agent_grpo.py is the same on a
model that learns from scratch in minutes.

Reached: the whole path runs on stories260k (maze); not yet run on a model that can learn.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax

from experiments.common import command_line, conversations, data, models, runs, train
from experiments.common.algorithms import CriticFree, critic_free
from experiments.common.conversations import ConversationSettings
from experiments.common.environments import NamedEnvironment, ToolFormat, named_environment
from experiments.common.optimizer import make_optimizer
from experiments.common.sampling import training_sampling
from experiments.common.settings import Batches, MeshShape, Optimizer, Rare, Sampling, Weights
from rljax.algorithms import turn_groups, with_kl
from rljax.data.prompts import Prompts, train_eval_split
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.envs.text import TextEnv, TurnLimits
from rljax.models import decoder, hf, policy
from rljax.rewards.sandbox import Level
from rljax.train.mesh import Shardings, make_mesh, place, shard_rows
from rljax.train.metrics import require_on_policy, reward_and_kl, rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.update import learn, make_update
from rljax.types import LM, Algorithm, AnnotateFn, TrainState

PROGRESS_METRICS = ("reward", "frac_reward_zero_std", "conversation/turns", "length", "kl_sequence")


@dataclasses.dataclass(frozen=True)
class Config:
    """GRPO, or another critic-free algorithm, with a KL term, over conversations with an environment."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    environment: str  # calculator, python, maze, guess, gymnasium:ID, reasoning_gym:TASK or verifiers:TASKSET
    prompts: str = ""  # jsonl file of problems, for calculator and python: columns question and answer
    episodes: int = 1024  # episodes of an environment that needs no file, those of the evaluation among them
    tool_format: ToolFormat = "hermes"  # how the model writes calls
    isolation: Rare[Level] = "namespaces"  # of the model's programs, for python (SECURITY.md)
    max_turns: int = 4  # turns of the model in a conversation; cut then
    max_context: int = 1024  # tokens of a conversation, prompt and observations included; cut then
    turn_seconds: Rare[float] = 30.0  # that the environment may take for a turn; the conversation is cut then
    max_observation: Rare[int] = 2000  # characters of a message that answers a turn; the middle is cut out
    max_failed: Rare[float] = 0.5  # share of conversations that the environment may leave without a reward
    algorithm: CriticFree = "grpo"  # how to learn
    credit: Literal["trajectory", "turn"] = "trajectory"  # turn: of one index in a group are compared
    seed: int = 0  # of the order of prompts, of episodes and of sampling
    steps: int = 20  # steps: converse, score, update
    kl_coef: float = 0.04  # coefficient of the KL to the reference
    batches: Batches = Batches(prompts=16, num_generations=8)
    sampling: Sampling = Sampling(max_tokens=256)  # of a turn
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_prompts: int = 32  # prompts held out for evaluation
    eval_samples: Rare[int] = 256  # conversations on these in each evaluation
    save_every: Rare[int] = 20  # steps between checkpoints
    log_samples_every: Rare[int] = 10  # steps between samples in the report
    directory: str = ""  # of the run; default runs/agent_grpo/ALGORITHM-ENVIRONMENT-MODEL-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(
    cfg: Config, algorithm: Algorithm | None = None, environment: NamedEnvironment | None = None
) -> dict[str, dict[str, float]]:
    """Train; return reward and KL on the eval prompts before and after.

    `algorithm` replaces the one that cfg names, its KL term included; `environment` the one that it names.
    """
    train.check_directory(cfg.directory, algorithm)
    name = "" if algorithm else cfg.algorithm
    algorithm = algorithm or named_algorithm(cfg)
    cfg = runs.checked(cfg, algorithm.least_group)
    batches = cfg.batches
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_batches(batches, mesh)
    train.check_whole_groups(batches)
    train.check_algorithm(algorithm, batches, name)

    # -- environment, model and data
    env, rows = environment or named_environment(
        cfg.environment, cfg.tool_format, cfg.prompts, cfg.episodes, cfg.seed, cfg.isolation
    )
    tokenizer = read_tokenizer(cfg)
    # frozen: the reference of the KL term, and with an adapter the model under it
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, cfg.max_context, cfg.seed)
    algorithm = train.with_own_old_logp(algorithm, config)
    sampling = training_sampling(cfg.sampling, batches.num_generations, tokenizer, config.vocab_size)
    settings = conversation_settings(cfg, env, tokenizer, sampling)
    train_prompts, eval_prompts = read_episodes(cfg, settings, rows)

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen)
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    model = policy.make_policy(config)
    lm = decoder.language_model(config)
    converse = conversations.make_converse(lm, settings)
    sizes = (batches, shardings, config, 1, cfg.max_context - 1)  # prompts end in different columns: none is shared
    annotate, annotate_eval = train.make_annotates(model, (*algorithm.needs, "ref_logp"), *sizes)
    credit = jax.jit(algorithm.credit)
    make = partial(make_update, policy_objective(model, algorithm), optimizer, shardings=shardings)
    update = train.cut_update(make, *sizes)
    per_token = train.make_token_columns(model, *sizes)
    evaluate = make_evaluate(cfg, lm, annotate_eval, settings, eval_prompts, shardings)

    # -- the loop
    kind = f"{cfg.algorithm}-{env.name.replace(':', '-')}"
    run = runs.make_run(cfg, __file__, kind, algorithm, {"environment": env.step}, PROGRESS_METRICS)
    with run:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        state = place(state, shardings.state, donate=True)
        converse, update = run.timed(converse=converse, update=update)
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            prompts = train_prompts.draw(state.cursor, batches.prompts)
            rollout = converse(state, prompts, step)
            traj = annotate(state, shard_rows(shardings, rollout.traj))
            batch = credit(traj, state.coefficients)
            state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches, at_old_policy=True)
            if run.is_first_step(step):
                require_on_policy(metrics, train.on_policy_tolerance(config))
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            state = models.sync_reference(state, cfg.weights)
            if run.should_log_samples(step):
                notes = conversations.turn_notes(rollout.conversations)
                shown = (tokenizer.decode_all, conversations.REWARD_NAMES, prompts, per_token(state, traj), notes)
                run.log_samples(step, batch, *shown)
            run.record(step, state, rollout_metrics(traj, conversations.REWARD_NAMES) | rollout.metrics | metrics)
        after = evaluate(state)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    return runs.summarize(cfg, before, after, run.directory / "model")


def named_algorithm(cfg: Config) -> Algorithm:
    """The algorithm that cfg names, with its credit and the KL to the reference.

    Raises ValueError for credit by turns of an algorithm that does not compare the completions of a group.
    """
    longest = min(cfg.sampling.max_tokens * cfg.max_turns, cfg.max_context)  # that can be sampled in a conversation
    algorithm = critic_free(longest)[cfg.algorithm]()
    if cfg.credit == "turn":
        if algorithm.group_signal is None or algorithm.needs or algorithm.reads != "rewards":
            raise ValueError(f"{cfg.algorithm} does not compare rewards of a group; legal: --credit trajectory")
        algorithm = turn_groups(algorithm)
    return with_kl(algorithm, cfg.kl_coef)


def read_tokenizer(cfg: Config) -> Tokenizer:
    """The model's tokenizer. Raises ValueError for conversations that are longer than its context."""
    config = hf.read_config(cfg.model)
    if cfg.max_context > config.max_positions:
        raise ValueError(f"max_context = {cfg.max_context}; legal: at most {config.max_positions}, the model's context")
    return load_tokenizer(cfg.model, config.vocab_size)


def conversation_settings(cfg: Config, env: TextEnv, tokenizer: Tokenizer, sampling: Sampling) -> ConversationSettings:
    """How conversations are sampled."""
    limits = TurnLimits(cfg.turn_seconds, cfg.max_observation)
    codec = conversations.make_codec(tokenizer, env.tools)
    return ConversationSettings(
        env, codec, limits, sampling, cfg.seed, cfg.max_turns, cfg.max_context, max_failed=cfg.max_failed
    )


def read_episodes(cfg: Config, settings: ConversationSettings, rows: list[dict]) -> tuple[Prompts, Prompts]:
    """The beginnings of episodes to train on and to evaluate on. The seed of one is its place among the rows."""
    longest = data.max_prompt_length(0, cfg.sampling.max_tokens, cfg.max_context)
    rows = [{conversations.SEED: cfg.seed + i, **row} for i, row in enumerate(rows)]
    sides = train_eval_split(range(len(rows)), cfg.eval_prompts, cfg.seed)
    train_side, eval_side = (
        conversations.environment_prompts(
            settings.env, [rows[i] for i in side], settings.codec, longest, cfg.seed, settings.limits
        )
        for side in sides
    )
    return train_side, eval_side


def make_evaluate(
    cfg: Config,
    lm: LM,
    annotate: AnnotateFn,
    settings: ConversationSettings,
    prompts: Prompts,
    shardings: Shardings,
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> mean reward, its standard error, and KL to the reference; always with the same key."""
    sampling = settings.sampling.replace(n=math.ceil(cfg.eval_samples / len(prompts)))
    converse = conversations.make_converse(lm, settings._replace(sampling=sampling))

    def evaluate(state: TrainState) -> dict[str, float]:
        rollout = converse(state, prompts.first(len(prompts)), step=-1)
        return reward_and_kl(annotate(state, shard_rows(shardings, rollout.traj)))

    return evaluate


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
