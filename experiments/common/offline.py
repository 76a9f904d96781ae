"""What scripts share that learn from a file of examples: sizes, pieces of an update, held-out examples, the run."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data, hub, micro_batches, train
from experiments.common.best import keep_best
from experiments.common.inputs import inputs_of
from experiments.common.rows import examples_in
from experiments.common.settings import LOGISTICS, PLACEMENT, Batches
from experiments.common.unread import check_unread
from rljax.data.examples import Example
from rljax.models.decoder import DecoderConfig
from rljax.models.hf import RewardKind
from rljax.ops import groups
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.train.mesh import RULES, Shardings, data_parallel_size, shard_rows
from rljax.train.run import Run
from rljax.train.update import map_micro_batches
from rljax.types import Array, Objective, Params, TrainState

NARROWER = "--data.max_tokens {} leaves the others out"  # for `data.report_padding`


def check_settings(cfg: Any, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError unless a batch divides into micro-batches over the devices, the reference stays as it is, and
    every setting is read."""
    check_unread(cfg, samples=False)
    devices = data_parallel_size(mesh)
    ways = devices * max(cfg.micro_batches, 1)
    if cfg.batch_size < 1 or cfg.micro_batches < 0 or cfg.batch_size % ways:
        raise ValueError(
            f"batch_size = {cfg.batch_size}, micro_batches = {cfg.micro_batches} (0: chosen from sizes) over {devices} "
            f"devices ({' x '.join(RULES['rows'])}); legal: a batch_size that is a multiple of {ways}"
        )
    if cfg.weights.ref_sync_steps:
        raise ValueError(f"weights.ref_sync_steps = {cfg.weights.ref_sync_steps}; legal when learning from a file: 0")


def one_small_step(cfg: Any) -> Any:
    """The settings with one step of as few examples as there are devices, and as few held out: small enough to run
    without jit."""
    size = jax.device_count()
    rows = dataclasses.replace(cfg.data, eval_size=min(size, cfg.data.eval_size))
    return dataclasses.replace(cfg, data=rows, steps=1, batch_size=size, micro_batches=1)


def make_run(cfg: Any, source: str, progress_metrics: Sequence[str], kind: str = "", **functions: Any) -> Run:
    """The run directory of a script's Config, by default runs/SCRIPT/KIND-MODEL-FILE-seedSEED."""
    parts = (kind, hub.model_name(cfg.model), data.name_of(cfg.data.files), f"seed{cfg.seed}")
    name = "-".join(part for part in parts if part) + "-debug" * cfg.debug
    return Run(
        cfg.directory or f"runs/{Path(source).stem}/{name}",
        hub.settings_of(cfg),
        steps=cfg.steps,
        source=source,
        functions=functions,
        inputs=inputs_of(cfg),
        save_every=cfg.save_every,
        progress_metrics=progress_metrics,
        placement=PLACEMENT,
        logistics=LOGISTICS,
    )


def widths(examples: Iterable[Example]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest completion."""
    lengths = [(len(example.prompt), len(example.completion)) for example in examples]
    return max(prompt for prompt, _ in lengths), max(completion for _, completion in lengths)


def tokens_of(examples: Iterable[Example]) -> list[int]:
    """Tokens of each example, its prompt among them."""
    return [len(example.prompt) + len(example.completion) for example in examples]


def choose_micro_batches(
    config: DecoderConfig,
    batch_size: int,
    wanted: int,
    prompt_tokens: int,
    max_tokens: int,
    shardings: Shardings,
    what: str = "an update",
) -> int:
    """The number of micro-batches of an update: the one wanted, or where that is 0 one chosen from sizes.

    Args:
      prompt_tokens, max_tokens: of an example. The completions that share a prompt count as one.
      what: is cut, for the log.
    """
    batches = Batches(prompts=batch_size, num_generations=1, micro_batches=wanted)
    pieces = micro_batches.cut(config, batches, prompt_tokens, max_tokens, shardings.rows.mesh).micro_batches
    log_info(f"{what} is cut into {pieces} micro-batches")
    return pieces


def filled(examples: Sequence, size: int, empty: Any) -> list[list]:
    """All examples in lists of `size`, the last one filled up with empty ones: of one shape, which compiles once."""
    pieces = [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    return [piece + [empty] * (size - len(piece)) for piece in pieces]


def make_evaluate(
    objective: Objective, rows: Sequence, batches: Sequence, metrics: Sequence[str], pieces: int, shardings: Shardings
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> the loss and the objective's `metrics` over all rows of the batches, each as eval_NAME.

    With "accuracy" among them, its standard error too, that of independent prompts. All held-out rows are one optimizer
    batch, cut into `pieces` for each of the batches: what an objective takes from the whole batch (KTO's z, BCO's δ,
    AOT's matching) does not depend on how they are cut.

    Args: rows: those that the batches are made of, in their order, without what fills up the last batch.
    """
    prompts = [tuple(next(examples_in(row)).prompt) for row in rows]
    number = {prompt: i for i, prompt in enumerate(prompts)}
    group = jnp.asarray([number[prompt] for prompt in prompts])
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    map_rows = partial(map_micro_batches, micro_batches=pieces * len(batches))

    @jax.jit
    def measure(params, frozen, batch):
        batch = objective.prepare(params, frozen, batch, jax.random.key(0), map_rows)

        def measure_piece(piece):
            loss, _ = objective.loss(params, frozen, piece)
            found = metrics_by_row(objective, params, frozen, piece) if metrics else {}
            of_piece = jnp.zeros(len(piece.weight)).at[0].set(loss)
            return {"loss": of_piece} | {name: found[name] for name in metrics}

        found = map_rows(measure_piece, batch)
        count = (batch.weight > 0).astype(float)
        return found | {"loss": (found["loss"] * count.sum(), count)}

    def evaluate(state: TrainState) -> dict[str, float]:
        batch = whole
        if objective.state:
            carried = {name: state.coefficients[name] for name in objective.state}
            batch = batch.replace(coefficients=batch.coefficients | carried)
        measured = distributed.fetch(measure(state.params, state.frozen, shard_rows(shardings, batch)))
        found = jax.tree.map(lambda x: x.astype(np.float64), measured)
        means = {f"eval_{name}": float(x.sum() / n.sum()) if n.sum() else math.nan for name, (x, n) in found.items()}
        if "accuracy" in metrics:
            right, count = (jnp.asarray(x[: len(rows)], jnp.float32) for x in found["accuracy"])
            means["eval_accuracy_error"] = float(groups.standard_error(right, count, group))
        return means

    return evaluate


def metrics_by_row(objective: Objective, params: Params, frozen: Params, batch: Any) -> dict[str, tuple[Array, Array]]:
    """The objective's metrics of each row alone, as (sum [B], count [B]): with the masks of all other rows empty.

    A model reads tokens, not masks, so it is computed once for all rows.
    """
    rows = jnp.arange(len(batch.weight))

    def keep_row(row: Array, path: tuple, x: Array) -> Array:
        is_mask = getattr(path[-1], "name", "") == "mask"
        return x & (rows == row).reshape(-1, *[1] * (x.ndim - 1)) if is_mask else x

    def alone(row: Array) -> dict[str, tuple[Array, Array]]:
        return objective.loss(params, frozen, jax.tree.map_with_path(partial(keep_row, row), batch))[1]

    return jax.vmap(alone)(rows)


class Evaluation(NamedTuple):
    """How the model is evaluated during a run, and which one is the best."""

    config: DecoderConfig
    evaluate: Callable[[TrainState], dict[str, float]]
    metric: str  # by which models are compared
    lower_is_better: bool = False
    reward_kind: RewardKind = "outcome"  # of a reward model


def evaluate_when_due(cfg: Any, run: Run, step: int, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
    """The evaluation every `eval_every` steps but the last, the best model being kept; else {}."""
    return _evaluate(cfg, run, state, evaluation) if train.is_due(cfg.eval_every, step, run.total_steps) else {}


def evaluate_at_end(cfg: Any, run: Run, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
    """The evaluation of the last state, whose checkpoint is there: logged with the last step."""
    found = _evaluate(cfg, run, state, evaluation)
    run.add_metrics(found)
    return found


def _evaluate(cfg: Any, run: Run, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
    config, evaluate, metric, *how = evaluation
    found = evaluate(state)
    if cfg.eval_every:
        keep_best(run, state, config, cfg.model, metric, found[metric], *how)
    return found


def summarize(before: dict[str, float], after: dict[str, float], model: Path) -> dict[str, dict[str, float]]:
    """Print the accuracy on held-out rows before and after, and where the model is; what `main` returns."""
    shares = " -> ".join(f"{at['eval_accuracy']:.3f} ± {at['eval_accuracy_error']:.3f}" for at in (before, after))
    log_info(f"eval accuracy: {shares}; model: {model}")
    return {"before": before, "after": after}
