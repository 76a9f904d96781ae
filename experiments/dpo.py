r"""DPO and its family: a language model from comparisons or judgments of completions, without a reward model.

    python experiments/dpo.py --model runs/sft/NAME/model --data.files preferences.jsonl
    python experiments/dpo.py --model DIR --data.files preferences.jsonl --loss simpo --beta 2.5
    python experiments/dpo.py --model DIR --data.files thumbs.jsonl --loss kto

A line is {"prompt", "chosen", "rejected"}; odpo reads "margin" too, tpo a third completion "gold". kto, bco and their
like read {"prompt", "completion", "label"}, or a pair as two judgments. What --loss names stands in
experiments/common/preference_methods.py, each with the β of its paper; its other numbers are changed there, or by
main(cfg, method=...). The reference is the model as it was at the start: its log-probs of the rows that will be drawn
are computed before the first step, at each start of the command. A run writes DIRECTORY/model, and with --eval_every
DIRECTORY/best, which had the lowest loss on held-out rows. The same command goes on where it stopped.

Reached: stories260k on the 3,142 comparisons of collect.py's header without noise, each completion with an EOS (--steps
100 --data.eval_size 400 --optimizer.learning_rate 1e-4): loss 0.693 -> 0.622, accuracy 0.676 on 400 held-out pairs of
other prompts.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.common import command_line, data, models, offline, train
from experiments.common.optimizer import make_optimizer
from experiments.common.preference_methods import METHODS, Method
from experiments.common.preference_rows import collate_rows, empty_row, read_rows, with_reference
from experiments.common.settings import Data, MeshShape, Optimizer, Weights
from rljax.data.prompts import shuffled_indices
from rljax.models import policy
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh, place
from rljax.train.shared_prefix import make_shared_prefix_update
from rljax.train.update import make_update
from rljax.types import TrainState

PROGRESS_METRICS = ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "epoch")


@dataclasses.dataclass(frozen=True)
class Config:
    """Learning from preferences, without a reward model."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    data: Data  # comparisons, or judgments
    loss: Literal[tuple(METHODS)] = "sigmoid"  # the method
    beta: float | None = None  # β, of the KL to the reference or of the reward; default: that of the method's paper
    seed: int = 0  # of the order of the rows
    steps: int = 100  # optimizer updates
    batch_size: int = 32  # rows per step
    micro_batches: int = 0  # number of pieces of an update; the gradient does not depend on it; 0: chosen from sizes
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="linear")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_every: int = 20  # steps between evaluations on held-out rows; 0: before and after training only
    save_every: int = 50  # steps between checkpoints
    directory: str = ""  # of the run; default runs/dpo/LOSS-MODEL-FILE-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config, method: Method | None = None) -> dict[str, dict[str, float]]:
    """Train; return loss, accuracy and rewards on held-out rows before and after.

    `method` replaces the one that cfg.loss names.
    """
    cfg = offline.one_small_step(cfg) if cfg.debug else cfg
    mesh = make_mesh(**cfg.mesh.sizes)
    offline.check_settings(cfg, mesh)
    method = method or METHODS[cfg.loss]
    are_pairs = method.rows != "judgments"

    # -- model and data
    tokenizer, context = data.load_tokenizer_and_context(cfg.model)
    rows = read_rows(cfg.data, method, tokenizer, context, cfg.seed)
    examples = [example for row in (*rows.train, *rows.eval) for example in row.completions]
    widths = offline.widths(examples)
    lengths = offline.tokens_of(examples)
    data.report_padding(lengths, sum(widths), "completions", offline.NARROWER)
    config, params, frozen = models.load_pretrained(
        cfg.model, cfg.weights, mesh, max(lengths), cfg.seed, reference=False
    )

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    model = policy.make_policy(config)
    objective = method.make(model, method.beta if cfg.beta is None else cfg.beta)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen)
    state = state.replace(coefficients={name: jnp.zeros(()) for name in objective.state})
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    collate = partial(collate_rows, method=method, prompt_tokens=widths[0], max_tokens=widths[1])
    completions = len(rows.train[0].completions)
    prompt_tokens, max_tokens = widths if are_pairs else (1, sum(widths))
    sizes = (cfg.batch_size, cfg.micro_batches, prompt_tokens, completions * max_tokens)
    pieces = offline.choose_micro_batches(config, *sizes, shardings)
    update = make_update(objective, optimizer, pieces, shardings)
    if are_pairs and prompt_tokens > 1:
        update = make_shared_prefix_update(update, prompt_tokens - 1, 2, shardings)

    # -- the loop
    with offline.make_run(cfg, __file__, PROGRESS_METRICS, cfg.loss, method=method) as run:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        state = place(state, shardings.state, donate=True)
        if method.reference:
            annotate = policy.make_annotate(model, ("old_logp",))
            drawn = shuffled_indices(len(rows.train), cfg.seed, 0, cfg.steps * cfg.batch_size)
            rows = with_reference(rows, drawn, annotate, state, widths, cfg.batch_size // pieces, shardings)
        eval_rows = offline.filled(rows.eval, cfg.batch_size, empty_row(rows.eval[0]))
        eval_batches = list(map(collate, eval_rows))
        measured = (rows.eval, eval_batches, eval_metrics(method))
        evaluate = offline.make_evaluate(objective, *measured, pieces, shardings)
        (evaluate,) = run.timed(eval=evaluate)
        evaluation = offline.Evaluation(config, evaluate, "eval_loss", lower_is_better=True)
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            batch = collate(data.draw(rows.train, cfg.seed, state.cursor, cfg.batch_size))
            state, metrics = update(state, batch)
            state = state.replace(step=step + 1, cursor=state.cursor + cfg.batch_size)
            metrics["epoch"] = state.cursor / len(rows.train)
            metrics |= offline.evaluate_when_due(cfg, run, step, state, evaluation)
            run.record(step, state, metrics)
        after = offline.evaluate_at_end(cfg, run, state, evaluation)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    log_info(f"held-out rows: {shown(before, after)}; model: {run.directory / 'model'}")
    return {"before": before, "after": after}


def shown(before: dict[str, float], after: dict[str, float]) -> str:
    """The last line of a run. Before training all rewards to a reference are 0, and accuracy says nothing."""
    changes = [f"{name.removeprefix('eval_')} {before[name]:.4g} -> {after[name]:.4g}" for name in after]
    texts = [text for text in changes if not text.startswith("accuracy")]
    if "eval_accuracy" in after:
        texts.append(f"accuracy {after['eval_accuracy']:.3f} ± {after['eval_accuracy_error']:.3f}")
    return ", ".join(texts)


def eval_metrics(method: Method) -> tuple[str, ...]:
    """What is measured on held-out rows besides the loss."""
    rewards = ("rewards/chosen", "rewards/rejected")
    return rewards if method.rows == "judgments" else ("accuracy", "margin", *rewards)


if __name__ == "__main__":
    command_line.run(Config, main)
