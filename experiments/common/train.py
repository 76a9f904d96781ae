"""What the main functions of recipes share: checks of sizes, the update, shardings, evaluation."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.common import micro_batches, settings
from experiments.common.sampling import make_sample_in_pieces
from experiments.common.settings import Batches
from rljax.algorithms import truncate_is
from rljax.algorithms.common.wrappers import with_needs
from rljax.algorithms.dynamic_sampling import dynamic_sampling, filter_groups
from rljax.data.prompts import Prompts
from rljax.models import policy as policies
from rljax.models.decoder import DecoderConfig
from rljax.rewards.score import Score
from rljax.rollouts.self_check import require_batch_invariance
from rljax.train import distributed
from rljax.train.log import log_info, table, write_atomically
from rljax.train.mesh import RULES, Shardings, data_parallel_size, state_shardings
from rljax.train.metrics import reward_and_kl
from rljax.train.packing import SharedColumns, make_packed_update
from rljax.train.run import Run
from rljax.train.sharding_table import sharding_table
from rljax.train.shared_prefix import make_shared_prefix_annotate, make_shared_prefix_update
from rljax.types import LM, Algorithm, AnnotateFn, Array, PolicyFn, Sampling, TrainState, Trajectory

# Nats by which log-probs of sampler and trainer may differ at the same parameters: rounding of the largest logits.
ON_POLICY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def on_policy_tolerance(config: DecoderConfig, server: settings.Server = settings.Server()) -> float:  # noqa: B008
    """Nats by which log-probs of sampler and trainer may differ at the first update of a run."""
    if server.url:
        return math.inf if server.weights == "keep" else server.max_gap
    return 0.0 if config.batch_invariant else ON_POLICY_TOLERANCE[config.dtype]


def check_batch_invariance(config: DecoderConfig, lm: LM, policy: PolicyFn, state: TrainState) -> None:
    """In batch-invariant mode, print the gap of sampler and trainer on this machine; ValueError where it is not 0."""
    if config.batch_invariant:
        require_batch_invariance(lm, policy, state.params, state.frozen, config.vocab_size, log_info)


def check_batches(batches: Batches, mesh: jax.sharding.Mesh, carries_over: bool = False) -> None:
    """Raise one ValueError that lists every number that does not divide, with the nearest legal ones.

    carries_over: whether the recipe continues unfinished completions in the next step (`sampling.make_draw`).
    """
    wrong = _too_small(batches)
    if not wrong:
        wrong = _carry_over(batches, carries_over) + _completions(batches, mesh) + _pieces(batches, mesh)
    if wrong:
        raise ValueError("batch sizes that do not divide: " + "; ".join(wrong))


def check_whole_groups(batches: Batches) -> None:
    """Raise ValueError for settings of rollouts that a recipe does not have which learns from all rows of each step."""
    for name, legal in (("oversample", 1), ("filter_groups", False), ("carry_over", 0), ("max_tokens_per_device", 0)):
        value = getattr(batches, name)
        if value != legal:
            raise ValueError(f"{name} = {value}, but this recipe learns from all completions of a step; legal: {legal}")


def check_directory(directory: str, own: Algorithm | None) -> None:
    """Raise ValueError for an algorithm that is handed in without a directory: the default one is another's."""
    if own is not None and not directory:
        raise ValueError("an algorithm of your own wants a directory of its own: Config(directory=...)")


def check_algorithm(algorithm: Algorithm, batches: Batches, name: str = "", other: bool = False) -> None:
    """Raise ValueError for sizes with which this method would learn something else than it says, or nothing.

    other: another policy samples.
    """
    found = algorithm.loss.__qualname__.split(".")[0]
    name = name or ("this algorithm" if found.startswith("_") else found)
    if algorithm.one_update and (batches.epochs, batches.minibatches) != (1, 1):
        sizes = f"epochs x minibatches = {batches.epochs} x {batches.minibatches}"
        raise ValueError(f"{name} is right for one update of a rollout, on all rows: {sizes}; legal: 1 x 1")
    if algorithm.whole_groups and (batches.minibatches != 1 or batches.max_tokens_per_device):
        sizes = f"minibatches = {batches.minibatches}, max_tokens_per_device = {batches.max_tokens_per_device}"
        raise ValueError(f"{name} compares the completions of a prompt in its loss: {sizes} separate them; legal: 1, 0")
    if batches.num_generations < algorithm.least_group:
        raise ValueError(
            f"{name} compares the completions of a prompt: num_generations = {batches.num_generations} leaves too few; "
            f"legal: {algorithm.least_group} or more"
        )
    if algorithm.off_policy == "never" and batches.carry_over:
        sizes = f"carry_over = {batches.carry_over} goes on with those of older ones"
        raise ValueError(f"{name} is right for samples of its own policy alone: {sizes}; legal: 0")
    if algorithm.off_policy == "never" and other:
        raise ValueError(
            f"{name} is right for samples of its own policy alone, and here another one samples; legal: "
            "--server.weights push to a server in float32, or another algorithm"
        )
    if algorithm.group_signal is None and batches.filter_groups:
        raise ValueError(f"{name} learns from every completion: filter_groups would leave some out; legal: without it")
    if algorithm.group_signal is None and batches.oversample != 1:
        sizes = f"oversample = {batches.oversample}"
        raise ValueError(f"{name} learns from every completion: {sizes} would select prompts by outcome; legal: 1")


def with_filtered_groups(algorithm: Algorithm, batches: Batches) -> Algorithm:
    """The algorithm that leaves out groups without a signal, where the settings say so."""
    return filter_groups(algorithm) if batches.filter_groups else algorithm


def make_keep(algorithm: Algorithm, batches: Batches) -> Callable[[Trajectory], Trajectory]:
    """keep(trajectory) -> the rows to learn from: groups that teach something first, all rows where oversample is 1."""
    signal = algorithm.group_signal or every_group
    return jax.jit(partial(dynamic_sampling, rows=batches.prompts * batches.num_generations, group_signal=signal))


def every_group(traj: Trajectory) -> Array:
    """All rows: the signal of a method that learns from every completion."""
    return jnp.ones(traj.mask.shape[0], bool)


def with_own_old_logp(
    algorithm: Algorithm, config: DecoderConfig, carry_over: int = 0, other: bool = False
) -> Algorithm:
    """The algorithm whose ratios are to the trainer's own log-probs, where those of the sampler are not near enough.

    In half precision two programs of one model differ by more than some clip ranges. Costs a forward pass a step.
    Completions that go on in the next step were sampled by older policies: there, in any precision, the trainer's
    log-probs come with the weight π_old/π_sampler (`truncate_is`), and so where another policy samples (`other`). An
    algorithm that corrects for the sampler itself (`Algorithm.off_policy`) stays as it is.
    """
    if algorithm.off_policy == "itself":
        return algorithm
    if carry_over or other:
        return truncate_is(algorithm)
    is_near = config.dtype == "float32" or config.batch_invariant or algorithm.one_update
    return algorithm if is_near else with_needs(algorithm, "old_logp")


def _too_small(batches: Batches) -> list[str]:
    wrong = []
    for field in dataclasses.fields(batches):
        value = getattr(batches, field.name)
        least = min(field.default, 1)
        if value < least:
            wrong.append(f"{field.name} = {value}; at least {least}")
    return wrong


def _carry_over(batches: Batches, carries_over: bool) -> list[str]:
    if batches.carry_over and not carries_over:
        return [f"carry_over = {batches.carry_over}, but this experiment continues no completion; legal: 0"]
    return []


def _completions(batches: Batches, mesh: jax.sharding.Mesh) -> list[str]:
    """A sampler's completions divide over the devices that have rows; prompts alone need not."""
    ways = data_parallel_size(mesh, "rollout_rows")
    step = ways // math.gcd(ways, batches.num_generations)
    wrong = []
    for name in ("prompts", "carry_over"):
        prompts = getattr(batches, name)
        if prompts % step:
            below = prompts // step * step
            nearest = sorted({max(step, below), below + step})
            wrong.append(
                f"{name} x num_generations = {prompts} x {batches.num_generations} completions over {ways} devices "
                f"({' x '.join(RULES['rollout_rows'])}); nearest legal {name}: {nearest}"
            )
    return wrong


def _pieces(batches: Batches, mesh: jax.sharding.Mesh) -> list[str]:
    ways = data_parallel_size(mesh)
    rows = batches.prompts * batches.num_generations
    pieces_of_update = 1 if batches.max_tokens_per_device else batches.micro_batches or 1
    pieces = batches.minibatches * pieces_of_update
    legal = [p for p in range(1, rows + 1) if rows % p == 0 and (rows // p) % ways == 0]
    if pieces in legal:
        return []
    nearest = sorted(sorted(legal, key=lambda p: abs(p - pieces))[:4])
    return [
        f"prompts x num_generations = {batches.prompts} x {batches.num_generations} = {rows} rows "
        f"in minibatches x micro_batches = {batches.minibatches} x {pieces_of_update} = {pieces} pieces; "
        f"nearest legal products: {nearest}"
    ]


def cut_update(
    make: Callable, batches: Batches, shardings: Shardings, config: DecoderConfig, prompt_tokens: int, max_tokens: int
) -> Callable:
    """The update of a batch in micro-batches that compute a prompt once for its completions; or packed, with at most
    `max_tokens_per_device` tokens at a time, a prompt once for those of its completions that are in a row.

    Args:
      make: (micro_batches=) -> update.
      prompt_tokens, max_tokens: tokens of a prompt and of a completion, as sampled. A packed row holds both.
    """
    row_length = prompt_tokens + max_tokens - 1
    if not batches.max_tokens_per_device:
        pieces = micro_batches.cut(config, batches, prompt_tokens, max_tokens, shardings.rows.mesh)
        log_info(f"an update is cut into {pieces.micro_batches} micro-batches; {pieces.group_size} rows share a prompt")
        update = make(micro_batches=pieces.micro_batches)
        if prompt_tokens == 1:
            return update
        return make_shared_prefix_update(update, prompt_tokens - 1, pieces.group_size, shardings)
    tokens = batches.max_tokens_per_device
    length = batches.packed_length or row_length
    if not row_length <= length <= tokens:
        raise ValueError(
            f"max_tokens_per_device = {tokens}, packed_length = {batches.packed_length} (0: as sampled), where rows as "
            f"sampled have {row_length} tokens; legal: {row_length} <= packed_length <= max_tokens_per_device"
        )
    # Shuffled minibatches separate the rows of a group; TPUs' attention kernel knows no segment that continues another.
    shares = prompt_tokens > 1 and batches.minibatches == 1 and config.backend != "tpu"
    shared = SharedColumns(prompt_tokens - 1, batches.num_generations) if shares else None
    return make_packed_update(
        lambda micro_batches: make(micro_batches=micro_batches), tokens, length, shardings, shared
    )


def cut_annotate(
    annotate: AnnotateFn,
    batches: Batches,
    shardings: Shardings,
    config: DecoderConfig,
    prompt_tokens: int,
    max_tokens: int,
) -> AnnotateFn:
    """The annotate that computes a prompt once for its completions, with no more rows at a time than an update.

    prompt_tokens, max_tokens: of a prompt and of a completion, as sampled.
    """
    rows_at_once = annotate_rows(batches, config, prompt_tokens, max_tokens, shardings.rows.mesh)
    devices = data_parallel_size(shardings.rows.mesh)
    group_size = micro_batches.largest_share(rows_at_once, batches.num_generations, devices)
    return make_shared_prefix_annotate(annotate, prompt_tokens - 1, group_size, rows_at_once, shardings)


def make_annotates(policy: PolicyFn, needs: tuple[str, ...], *sizes: Any) -> tuple[AnnotateFn, AnnotateFn]:
    """The annotate of a step, which fills `needs`, and that of an evaluation, which fills `ref_logp` alone, for its KL.

    One function where both fill the same. sizes: those of `cut_annotate`.
    """
    annotate = cut_annotate(policies.make_annotate(policy, needs), *sizes)
    if set(needs) <= {"ref_logp", "baseline"}:
        return annotate, annotate
    return annotate, cut_annotate(policies.make_annotate(policy, ("ref_logp",)), *sizes)


def annotate_rows(
    batches: Batches, config: DecoderConfig, prompt_tokens: int, max_tokens: int, mesh: jax.sharding.Mesh
) -> int:
    """How many rows of a rollout are annotated at a time: as many as a micro-batch of an update has."""
    pieces = micro_batches.cut(config, batches, prompt_tokens, max_tokens, mesh)
    return batches.prompts * batches.num_generations // (batches.minibatches * pieces.micro_batches)


def shardings_of(
    mesh: jax.sharding.Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    config: DecoderConfig,
    offload: tuple[str, ...] = (),
    teacher_config: DecoderConfig | None = None,
    show: bool = False,
) -> Shardings:
    """Shardings of a state whose parameters, trained and frozen, are those of a decoder.

    Args:
      teacher_config: of frozen["teacher"], if that is another decoder.
      show: print where each array lies, and end the process.
    """
    axes = policies.logical_axes(config, state.params)
    configs = {"teacher": teacher_config or config}
    frozen_axes = {name: policies.logical_axes(configs.get(name, config), part) for name, part in state.frozen.items()}
    shardings = state_shardings(mesh, state, optimizer, axes, frozen_axes, offload)
    if show:
        rows = sharding_table(state, shardings, {"params": axes, "frozen": frozen_axes})
        table(f"a state on {mesh.size} devices", rows)
        raise SystemExit(0)
    return shardings


def make_evaluate(
    lm: LM,
    annotate: AnnotateFn,
    score: Score,
    prompts: Prompts,
    sampling: Sampling,
    samples: int,
    seed: int,
    batches: Batches,
    shardings: Shardings,
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> mean reward, its standard error, and KL to the reference, of `samples` completions.

    Every evaluation samples with the same key, about as many completions at a time as a step of training.

    annotate: fills `ref_logp`.
    """
    all_prompts = prompts.first(len(prompts))
    sampling = sampling.replace(n=math.ceil(samples / len(prompts)))
    rows_at_once = batches.prompts * batches.oversample * batches.num_generations
    sample_pieces = make_sample_in_pieces(lm, all_prompts, sampling, shardings, rows_at_once)
    rows = len(prompts) * sampling.n

    def evaluate(state: TrainState) -> dict[str, float]:
        pieces = list(sample_pieces(state, seed))
        traj = jax.tree.map(lambda *x: jnp.concatenate(x)[:rows], *pieces)
        return reward_and_kl(score(annotate(state, traj), all_prompts))

    return evaluate


def before_training(run: Run, evaluate: Callable[[TrainState], Any], state: TrainState) -> Any:
    """What `evaluate` says of the model that a run begins with: evaluated once, kept in DIRECTORY/before.json."""
    file = run.directory / "before.json"
    stored = distributed.on_main("before", lambda: json.loads(file.read_text()) if file.is_file() else None)
    if stored is not None:
        return stored
    log_info("evaluating the model that the run begins with")  # with compilation, this is long
    found = evaluate(state)
    if distributed.is_main():
        write_atomically(file, json.dumps(found, default=float))
    return found


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an evaluation is due before this step is recorded: after every `every` steps (0: none) but the last.

    What is evaluated after the last step is evaluated once its checkpoint is there (`evaluate_at_end`).
    """
    done = step + 1
    return every > 0 and done % every == 0 and done < steps


def evaluate_at_end(run: Run, evaluate: Callable[[TrainState], dict[str, float]], state: TrainState) -> dict:
    """What `evaluate` says of the last state, whose checkpoint is there: logged with the last step."""
    found = evaluate(state)
    run.add_metrics(found)
    return found


def make_token_columns(policy: PolicyFn, *sizes: Any) -> Callable[[TrainState, Trajectory], dict[str, Array]]:
    """token_columns(state, traj) -> {"log_ratio": log π - log π_sampler [B T], "entropy": of π [B T]}, for the samples
    of the report.

    sizes: those of `cut_annotate`.
    """
    annotate = cut_annotate(policies.make_annotate(policy, ("old_logp", "entropy")), *sizes)

    def token_columns(state: TrainState, traj: Trajectory) -> dict[str, Array]:
        filled = annotate(state, traj)
        return {"log_ratio": filled.old_logp - traj.logp, "entropy": filled.entropy}

    return token_columns
