"""What scripts share that learn from a file of examples: sizes, pieces of an update, held-out examples, the run."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments.common import data, hub, micro_batches
from experiments.common.inputs import inputs_of
from experiments.common.settings import PLACEMENT, Batches
from rljax.data.examples import Example
from rljax.models.decoder import DecoderConfig
from rljax.train.log import log_info
from rljax.train.mesh import RULES, Shardings, data_parallel_size, shard_rows
from rljax.train.run import Run
from rljax.train.update import map_micro_batches, sum_over_micro_batches
from rljax.types import Objective, TrainState


def check_settings(cfg: Any, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError unless a batch divides into micro-batches over the devices, and the reference stays as it is."""
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
    """The settings with one step of as few examples as there are devices: small enough to run without jit."""
    return dataclasses.replace(cfg, steps=1, batch_size=jax.device_count(), micro_batches=1)


def make_run(cfg: Any, source: str, progress_metrics: Sequence[str], kind: str = "", **functions: Any) -> Run:
    """The run directory of a script's Config, by default runs/SCRIPT/KIND-MODEL-FILE-seedSEED."""
    parts = (kind, Path(cfg.model).resolve().name, data.name_of(cfg.data.files), f"seed{cfg.seed}")
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
    )


def widths(examples: Iterable[Example]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest completion."""
    lengths = [(len(example.prompt), len(example.completion)) for example in examples]
    return max(prompt for prompt, _ in lengths), max(completion for _, completion in lengths)


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
    devices = data_parallel_size(shardings.rows.mesh)
    pieces = micro_batches.cut(config, batches, prompt_tokens, max_tokens, devices).micro_batches
    log_info(f"{what} is cut into {pieces} micro-batches")
    return pieces


def filled(examples: Sequence, size: int, empty: Any) -> list[list]:
    """All examples in lists of `size`, the last one filled up with empty ones: of one shape, which compiles once."""
    pieces = [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    return [piece + [empty] * (size - len(piece)) for piece in pieces]


def make_evaluate(
    objective: Objective, batches: Sequence, metrics: Sequence[str], pieces: int, shardings: Shardings
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> the loss and the objective's `metrics` over all rows of the batches, each as eval_NAME.

    With "accuracy" among them, its standard error too. As in an update, statistics of a batch are those of the whole
    batch, which is then cut into `pieces`.
    """

    @jax.jit
    def measure(params, frozen, batch):
        map_rows = partial(map_micro_batches, micro_batches=pieces)
        batch = objective.prepare(params, frozen, batch, jax.random.key(0), map_rows)

        def loss_of_piece(piece):
            loss, found = objective.loss(params, frozen, piece)
            return loss, {name: found[name] for name in metrics}

        loss, found = sum_over_micro_batches(loss_of_piece, batch, pieces)
        count = (batch.weight > 0).sum().astype(float)
        return {"loss": (loss * count, count)} | found

    def evaluate(state: TrainState) -> dict[str, float]:
        totals = {name: (0.0, 0.0) for name in ("loss", *metrics)}
        for batch in batches:
            if objective.state:
                carried = {name: state.coefficients[name] for name in objective.state}
                batch = batch.replace(coefficients=batch.coefficients | carried)
            found = jax.device_get(measure(state.params, state.frozen, shard_rows(shardings, batch)))
            totals = {name: (totals[name][0] + found[name][0], totals[name][1] + found[name][1]) for name in totals}
        means = {f"eval_{name}": float(total / max(count, 1.0)) for name, (total, count) in totals.items()}
        if "accuracy" in metrics:
            share = means["eval_accuracy"]
            means["eval_accuracy_error"] = math.sqrt(share * (1.0 - share) / max(totals["accuracy"][1], 1.0))
        return means

    return evaluate


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an evaluation is due after this step: after every `every` of them (0: none), and after the last."""
    done = step + 1
    return done == steps or (every > 0 and done % every == 0)


def summarize(before: dict[str, float], after: dict[str, float], model: Path) -> dict[str, dict[str, float]]:
    """Print the accuracy on held-out rows before and after, and where the model is; what `main` returns."""
    shares = " -> ".join(f"{at['eval_accuracy']:.3f} ± {at['eval_accuracy_error']:.3f}" for at in (before, after))
    log_info(f"eval accuracy: {shares}; model: {model}")
    return {"before": before, "after": after}
