r"""On-policy distillation: a student writes, and learns to predict as its teacher does at each token (GKD, MiniLLM).

    python experiments/distil.py --model STUDENT_DIR --teacher TEACHER_DIR --prompts experiments/story_openings.jsonl
    python experiments/distil.py --model STUDENT_DIR --teacher TEACHER_DIR --prompts FILE.jsonl \
        --divergence jsd --on_policy_fraction 0.5

The teacher may have another architecture and size, but must have the student's vocabulary. With q the student and p the
teacher, the loss of a token is, by --divergence,

    reverse_kl   KL(q ‖ p)        forward_kl   KL(p ‖ q)        jsd   the generalized JSD of the two at β = ½
    minillm      KL(q ‖ p) of whole completions, by a policy gradient (arXiv:2306.08543)

over the whole vocabulary, at the temperature of sampling. A row is the student's own with probability
--on_policy_fraction (GKD's λ, arXiv:2306.13649), else the column `completion` of the file; with 0 nothing is sampled.

Reached: stories260k as the teacher, as the student a copy whose every array has noise of 0.3 of its deviation, 10 steps
of 32 completions of 64 tokens: KL to the teacher 313 -> 227 nats a sequence with reverse_kl, 246 with minillm.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.common import command_line, data, micro_batches, models, runs, settings, train
from experiments.common.optimizer import make_optimizer
from experiments.common.sampling import make_mix, make_sample_in_pieces, training_sampling
from experiments.common.settings import Batches, MeshShape, Optimizer, Rare, Sampling, Weights
from rljax import types
from rljax.algorithms import gkd, minillm
from rljax.data.prompts import Prompts
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, mixtures, policy
from rljax.models.decoder import DecoderConfig
from rljax.models.distillation import make_compare
from rljax.ops import groups
from rljax.ops.distillation import full_vocabulary
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info
from rljax.train.mesh import Shardings, make_mesh, place, shard_prompts
from rljax.train.update import learn, make_update
from rljax.types import LM, CompareFn, Distillation, Objective, TrainState

PROGRESS_METRICS = ("loss", "divergence", "eval_kl", "length", "tokens_per_second")
OBJECTIVES: dict[str, Callable[[CompareFn], Objective]] = {
    "reverse_kl": partial(gkd, beta=1.0),
    "forward_kl": partial(gkd, beta=0.0),
    "jsd": partial(gkd, beta=0.5),
    "minillm": minillm,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A student learns from a teacher's predictions on what the student writes."""

    model: str  # directory of the student: config.json, *.safetensors and a tokenizer
    teacher: str  # directory of the teacher, with the student's vocabulary
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt; FILE=WEIGHT mixes them
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: settings.Rows = settings.Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "minillm"] = "reverse_kl"  # of student and teacher
    on_policy_fraction: float = 1.0  # probability that the student writes a row; the others are the column `completion`
    teacher_mixture: Rare[float] = 0.0  # teacher's share of the policy that writes instead of the student (MiniLLM)
    seed: int = 0  # of the order of prompts and of sampling
    steps: int = 50  # steps: sample, update
    batches: Batches = Batches(prompts=32, num_generations=1)
    sampling: Sampling = Sampling(max_tokens=128)
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_prompts: int = 32  # prompts held out for evaluation
    eval_samples: Rare[int] = 128  # completions to these in each evaluation
    eval_every: Rare[int] = 0  # steps between evaluations, the best model is kept; 0: before and after training only
    save_every: int = 20  # steps between checkpoints
    log_samples_every: Rare[int] = 10  # steps between samples in the report
    directory: str = ""  # of the run; default runs/distil/DIVERGENCE-MODEL-PROMPTS-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Train; return the KL of the student to the teacher on the eval prompts before and after."""
    check_settings(cfg)
    cfg = runs.checked(cfg)
    batches = cfg.batches
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_whole_groups(batches)
    train.check_batches(batches, mesh)

    # -- student, teacher and data
    read = data.read_prompt if cfg.on_policy_fraction == 1 else data.read_answered_prompt
    tokenizer, train_prompts, eval_prompts = runs.read_data(cfg, read=read)
    if load_tokenizer(cfg.teacher).vocabulary() != tokenizer.vocabulary():
        raise ValueError(f"{cfg.teacher} has another vocabulary than {cfg.model}; legal: the same")
    context = max(train_prompts.length, eval_prompts.length) + cfg.sampling.max_tokens
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context, cfg.seed)
    teacher_config, teacher = models.load_teacher(cfg.teacher, config, cfg.weights.dtype, mesh, context)
    frozen = {name: part for name, part in frozen.items() if name != "reference"} | {"teacher": teacher}
    compare = make_compare(config, teacher_config)
    objective = OBJECTIVES[cfg.divergence](compare)
    sampling = training_sampling(cfg.sampling, batches.num_generations, tokenizer, config.vocab_size)

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen)
    shardings = train.shardings_of(
        mesh, state, optimizer, config, cfg.weights.offload, teacher_config, show=cfg.mesh.show_sharding
    )

    # -- the functions of a step
    lm = writer(cfg, config, teacher_config)
    mix = make_mix(cfg.on_policy_fraction, cfg.sampling, train_prompts, cfg.seed)
    pieces = micro_batches.cut(config, batches, train_prompts.length, cfg.sampling.max_tokens, mesh)
    update = make_update(objective, optimizer, pieces.micro_batches, shardings)
    evaluate = make_evaluate(cfg, decoder.language_model(config), compare, eval_prompts, sampling, shardings)
    run = runs.make_run(cfg, __file__, cfg.divergence, objective, {}, PROGRESS_METRICS)

    # -- the loop
    with run:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        state = place(state, shardings.state, donate=True)
        train.check_batch_invariance(config, decoder.language_model(config), policy.make_policy(config), state)
        update, evaluate = run.timed(update=update, eval=evaluate)
        evaluation = (config, evaluate, "kl", True)  # lower is better
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            prompts = train_prompts.draw(state.cursor, batches.prompts)
            placed = shard_prompts(shardings, prompts)
            sampled = partial(sample, lm, state.params, state.frozen, placed, sampling, cfg.seed, step)
            traj = mix(step, sampled, prompts)
            state, metrics = learn(update, state, Distillation(traj), batches.epochs, batches.minibatches)
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            if run.should_log_samples(step):
                run.log_samples(step, runs.without_credit(traj), tokenizer.decode, (), prompts)
            tokens = traj.mask.sum()
            metrics |= {"tokens": tokens, "length": tokens / len(traj.mask)}
            metrics |= runs.evaluate_when_due(cfg, run, step, state, *evaluation)
            run.record(step, state, metrics)
        after = runs.evaluate_at_end(cfg, run, state, *evaluation)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    kl = " -> ".join(f"{found['kl']:.2f} ± {found['error']:.2f}" for found in (before, after))
    log_info(f"eval KL of the student to the teacher: {kl} nats a sequence")
    return {"before": before, "after": after}


def check_settings(cfg: Config) -> None:
    """Raise ValueError for settings with which something else than the teacher's predictions would be learned."""
    share = cfg.on_policy_fraction
    if not 0 <= share <= 1:
        raise ValueError(f"on_policy_fraction = {share}; legal: 0 to 1")
    if share < 1 and (cfg.divergence == "minillm" or cfg.batches.num_generations > 1):
        raise ValueError(
            "completions of the file have no log-probs, which minillm needs, and there is one a row; "
            "legal: --on_policy_fraction 1, or another divergence and --batches.num_generations 1"
        )
    if cfg.weights.ref_sync_steps:
        raise ValueError(f"weights.ref_sync_steps = {cfg.weights.ref_sync_steps}; legal where the teacher stays: 0")
    if cfg.teacher_mixture and cfg.divergence != "minillm":
        raise ValueError("only minillm weights its tokens by the policy that wrote them; legal: --teacher_mixture 0")


def writer(cfg: Config, config: DecoderConfig, teacher_config: DecoderConfig) -> LM:
    """What writes the completions of a step: the student, or a mixture of it and the teacher."""
    if not cfg.teacher_mixture:
        return decoder.language_model(config)
    return mixtures.arithmetic_mixture(config, cfg.teacher_mixture, "teacher", teacher_config)


def make_evaluate(
    cfg: Config, lm: LM, compare: CompareFn, prompts: Prompts, sampling: types.Sampling, shardings: Shardings
) -> Callable:
    """evaluate(state) -> exact KL of the student's next tokens to the teacher's, summed over its own completions."""
    sampling = sampling.replace(n=-(-cfg.eval_samples // len(prompts)))
    rows_at_once = cfg.batches.prompts * cfg.batches.num_generations // cfg.batches.minibatches
    sample_pieces = make_sample_in_pieces(lm, prompts.first(len(prompts)), sampling, shardings, rows_at_once)

    @jax.jit
    def kl_of_rows(params, frozen, traj):
        found = compare(params, frozen, Distillation(traj), full_vocabulary(1.0))
        return jnp.where(traj.mask, found.divergence, 0.0).sum(axis=1), traj.group

    def evaluate(state: TrainState) -> dict[str, float]:
        pieces = [kl_of_rows(state.params, state.frozen, traj) for traj in sample_pieces(state, cfg.seed)]
        kl, group = (jnp.concatenate(parts)[: len(prompts) * sampling.n] for parts in zip(*pieces, strict=True))
        return {"kl": float(kl.mean()), "error": float(groups.standard_error(kl, jnp.ones_like(kl), group))}

    return evaluate


if __name__ == "__main__":
    command_line.run(Config, main)
