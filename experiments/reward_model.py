r"""A reward model from comparisons of completions: pairs, with a margin or without, or rankings of several.

    python experiments/reward_model.py --model runs/sft/NAME/model --data.files preferences.jsonl
    python experiments/reward_model.py --model DIR --data.files preferences.jsonl --center_rewards_coefficient 0.01
    python experiments/reward_model.py --model DIR --data.files rankings.jsonl --ranking_loss kwise

A line is {"prompt", "chosen", "rejected"}, optionally with a "margin", by how much the chosen one is better; or
{"prompt", "completions"}, the best completion first. A row of numbers after the last layer makes a score of the hidden
state behind a completion's last token; where the model is a reward model already, its own is trained on. A run writes
DIRECTORY/model, which transformers loads as a sequence classifier with one label and which --rewards of other scripts
takes; and with --eval_every DIRECTORY/best, the most accurate on held-out pairs. The same command goes on where it
stopped.

Reached: stories260k on the 3,142 comparisons of collect.py's header without noise, each completion with an EOS (--steps
200 --data.eval_size 400 --optimizer.learning_rate 1e-3): 0.470 -> 0.877 of 400 held-out pairs of other prompts, in 154
s on 2 shared CPU cores.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax

from experiments.common import command_line, data, models, offline, train
from experiments.common.optimizer import make_optimizer
from experiments.common.settings import Data, MeshShape, Optimizer, Weights
from rljax.algorithms import ranked_reward_model, reward_model
from rljax.data.demonstrations import EMPTY
from rljax.data.examples import Comparison, Example, comparison, ranking
from rljax.data.preferences import collate_pairs, collate_rankings
from rljax.data.tokenizer import Tokenizer
from rljax.models import heads
from rljax.ops.ranking import kwise, plackett_luce
from rljax.train.mesh import make_mesh, place
from rljax.train.shared_prefix import make_shared_prefix_update
from rljax.train.update import make_update
from rljax.types import Objective, ScoreFn, TrainState

RANKING_LOSSES = {"plackett_luce": plackett_luce, "kwise": kwise}
PROGRESS_METRICS = ("loss", "accuracy", "eval_accuracy", "eval_loss", "epoch")


@dataclasses.dataclass(frozen=True)
class Config:
    """A reward model on a pretrained model."""

    model: str  # directory with config.json, *.safetensors and a tokenizer; of a language model or a reward model
    data: Data  # comparisons
    ranking_loss: Literal["plackett_luce", "kwise"] = "plackett_luce"  # of rankings: of the order, or mean over pairs
    center_rewards_coefficient: float = 0.0  # of pairs: coefficient of the squared sum of scores, which centers them
    seed: int = 0  # of the order of the comparisons and of a new head
    steps: int = 100  # optimizer updates
    batch_size: int = 32  # comparisons per step
    micro_batches: int = 0  # number of pieces of an update; the gradient does not depend on it; 0: chosen from sizes
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_every: int = 20  # steps between evaluations on held-out comparisons; 0: before and after training only
    save_every: int = 50  # steps between checkpoints
    directory: str = ""  # of the run; default runs/reward_model/MODEL-FILE-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Train; return loss and accuracy on held-out comparisons before and after."""
    cfg = offline.one_small_step(cfg) if cfg.debug else cfg
    mesh = make_mesh(**cfg.mesh.sizes)
    offline.check_settings(cfg, mesh)

    # -- model and data
    tokenizer, context = data.load_tokenizer_and_context(cfg.model)
    rows = data.read_examples(cfg.data, read_row, tokenizer, context, cfg.seed)
    examples = [one for row in (*rows.train, *rows.eval) for one in completions_of(row)]
    prompt_tokens, max_tokens = offline.widths(examples)
    lengths = offline.tokens_of(examples)
    data.report_padding(lengths, prompt_tokens + max_tokens, "completions", offline.NARROWER)
    config, params, frozen = models.load_pretrained(
        cfg.model, cfg.weights, mesh, max(lengths), cfg.seed, reference=False, reward_model=True
    )

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen)
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    objective, collate, empty = make_method(cfg, rows, heads.make_reward_model(config), prompt_tokens, max_tokens)
    most = max(len(completions_of(row)) for row in (*rows.train, *rows.eval))
    sizes = (cfg.batch_size, cfg.micro_batches, prompt_tokens, most * max_tokens)
    pieces = offline.choose_micro_batches(config, *sizes, shardings)
    update = make_update(objective, optimizer, pieces, shardings)
    if isinstance(empty, Comparison) and prompt_tokens > 1:
        update = make_shared_prefix_update(update, prompt_tokens - 1, 2, shardings)
    eval_batches = [collate(part) for part in offline.filled(rows.eval, cfg.batch_size, empty)]
    evaluate = offline.make_evaluate(objective, rows.eval, eval_batches, ("accuracy", "reward"), pieces, shardings)

    # -- the loop
    with offline.make_run(cfg, __file__, PROGRESS_METRICS) as run:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter, "outcome")  # for export.py
        state = place(state, shardings.state, donate=True)
        (evaluate,) = run.timed(eval=evaluate)
        evaluation = offline.Evaluation(config, evaluate, "eval_accuracy")
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
    return offline.summarize(before, after, run.directory / "model")


def read_row(row: dict, tokenizer: Tokenizer) -> Comparison | list[Example]:
    """A row of either kind: a pair, or a ranking of several completions."""
    return ranking(row, tokenizer) if "completions" in row else comparison(row, tokenizer)


def completions_of(row: Comparison | list[Example]) -> list[Example]:
    """The completions of a row, best first."""
    return [row.chosen, row.rejected] if isinstance(row, Comparison) else row


def make_method(
    cfg: Config, rows: data.Examples, score: ScoreFn, prompt_tokens: int, max_tokens: int
) -> tuple[Objective, Callable, Comparison | list]:
    """The objective, the function that makes a batch of rows, and a row that teaches nothing.

    Raises ValueError where pairs and rankings are mixed, where only some pairs have a margin, and for a setting of the
    other kind of rows.
    """
    both = (*rows.train, *rows.eval)
    pairs = [row for row in both if isinstance(row, Comparison)]
    if pairs and cfg.ranking_loss != Config.ranking_loss:
        raise ValueError(f"--ranking_loss {cfg.ranking_loss} is read only with rankings, and these rows are pairs")
    if not pairs and cfg.center_rewards_coefficient:
        given = f"--center_rewards_coefficient {cfg.center_rewards_coefficient}"
        raise ValueError(f"{given} is read only with pairs, and these rows are rankings")
    if not pairs:
        most = max(map(len, both))
        objective = ranked_reward_model(score, RANKING_LOSSES[cfg.ranking_loss])
        sizes = {"most": most, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
        return objective, partial(collate_rankings, **sizes), []
    with_margin = sum(pair.margin is not None for pair in pairs)
    if len(pairs) < len(both) or 0 < with_margin < len(both):
        raise ValueError(
            f"of {len(both)} rows {len(pairs)} are pairs, and {with_margin} have a margin; "
            "legal: all or none are pairs, and of pairs all or none have a margin"
        )
    sizes = {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
    objective = reward_model(score, cfg.center_rewards_coefficient)
    return objective, partial(collate_pairs, with_margin=with_margin > 0, **sizes), Comparison(EMPTY, EMPTY, None)


if __name__ == "__main__":
    command_line.run(Config, main)
