"""What a step samples: completions of new prompts, and with `carry_over` those that the last step left unfinished."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data, settings
from experiments.common.difficulty import initial_rates, make_next_prompts
from experiments.common.remote_sampling import SampleFn
from experiments.common.rows import unescape
from experiments.common.settings import Batches
from rljax.algorithms.gkd import mix_completions
from rljax.data.demonstrations import demonstrations
from rljax.data.prompts import Prompts
from rljax.data.stop_strings import stop_strings
from rljax.data.tokenizer import Tokenizer
from rljax.rewards.score import Score
from rljax.rollouts import partial as rollouts
from rljax.rollouts.sample_token import distribution_settings
from rljax.rollouts.sampler import sample
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.train.mesh import Shardings, data_parallel_size, shard_prompts, shard_rows
from rljax.types import LM, Algorithm, AnnotateFn, Array, Params, PromptBatch, Sampling, TrainState, Trajectory


def make_sampling(options: settings.Sampling, n: int, tokenizer: Tokenizer, vocabulary: int) -> Sampling:
    """The sampler's settings for n completions per prompt; stop strings as an automaton over the model's ids."""
    strings = [unescape(text) for text in options.stop_strings]
    automaton = None
    if strings:
        automaton = jnp.asarray(stop_strings(strings, data.token_bytes(tokenizer, vocabulary)))
    return sampling_of(options, n, tokenizer.stop, automaton)


def sampling_of(
    options: settings.Sampling, n: int, stop: tuple[int, ...], stop_strings: Array | None = None
) -> Sampling:
    """The sampler's settings for n completions per prompt; log-probs are the policy's, whatever is cut off.

    stop_strings: their automaton, not those of the options.
    """
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        min_tokens=options.min_tokens,
        stop_strings=stop_strings,
        n=n,
        max_tokens=options.max_tokens,
        stop=stop,
        logp="policy",
        max_concurrent=options.max_concurrent,
    )


def keep_support(sampling: Sampling, bound: int, vocabulary: int) -> Sampling:
    """The sampling of a training run: where it truncates, the tokens drawn from are kept for the trainer.

    At most top_k of them a token, or without top_k `bound`, the most likely of what top_p and min_p keep. Raises
    ValueError for settings under which the trainer's distribution cannot be the sampler's.
    """
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0, of which there is no gradient; legal in training: above 0")
    changed = distribution_settings(sampling)
    cuts = set(changed) & {"top_k", "top_p", "min_p"}
    untrainable = sorted(set(changed) & {"repetition_penalty", "logit_bias"})
    if changed and not cuts:
        untrainable = changed
    if untrainable:
        raise ValueError(
            f"sampling.{untrainable[0]} changes the distribution that tokens are drawn from, and the trainer does not "
            "know it; legal in training: top_k, top_p and min_p, and with one of them min_tokens"
        )
    sampling = sampling.replace(logp=None)
    if not changed:
        return sampling
    kept = min(sampling.top_k or bound, vocabulary)
    log_info(f"the tokens drawn from go with each token sampled: at most {kept} of them, {4 * kept} bytes")
    return sampling.replace(top_k=None if sampling.top_k is None else min(sampling.top_k, kept), support=kept)


def greedy_of(sampling: Sampling) -> Sampling:
    """One greedy completion per prompt. The most likely token is never cut off: nothing is truncated."""
    return sampling.replace(temperature=0.0, n=1, top_k=None, top_p=None, min_p=None, support=None, logp="policy")


def training_sampling(options: settings.Sampling, n: int, tokenizer: Tokenizer, vocabulary: int) -> Sampling:
    """`make_sampling` of a training run (`keep_support`)."""
    return keep_support(make_sampling(options, n, tokenizer, vocabulary), options.support, vocabulary)


def row_tokens(prompts: Prompts, sampling: Sampling) -> int:
    """Tokens of a row: the longest prompt and the longest completion."""
    return prompts.length + sampling.max_tokens


def initial_extra(
    options: settings.PromptData, batches: Batches, prompts: Prompts, sampling: Sampling
) -> dict[str, Any] | None:
    """`TrainState.extra` before the first step: nothing is carried over yet, no pass rate is known."""
    rates = initial_rates(options, prompts, batches.carry_over)
    if not batches.carry_over:
        return rates
    columns = row_tokens(prompts, sampling)
    return rollouts.empty_carry(batches.carry_over, batches.num_generations, columns, sampling.support)


def make_draw(
    lm: LM,
    prompts: Prompts,
    batches: Batches,
    sampling: Sampling,
    shardings: Shardings,
    seed: int,
    options: settings.PromptData = settings.PromptData(),  # noqa: B008 (frozen)
    server: SampleFn | None = None,
) -> Callable[[TrainState, int], tuple[Trajectory, PromptBatch, TrainState]]:
    """draw(state, step) -> trajectory of prompts x oversample whole groups, their prompts, the state.

    With `carry_over` the state holds the unfinished groups, which the next step continues.

    options: which prompts are left out by their pass rate; default: none. server: samples in place of `lm`.
    """
    count = batches.prompts * batches.oversample
    next_prompts = make_next_prompts(options, prompts)
    carry = batches.carry_over

    def sample_rows(state: TrainState, step: int, rows: PromptBatch, sampling: Sampling) -> Trajectory:
        if server is not None:
            return shard_rows(shardings, server(state, step, rows, sampling))
        placed = shard_prompts(shardings, rows)
        return sample(lm, state.params, state.frozen, placed, sampling, seed, step)

    def draw(state: TrainState, step: int):
        rows = next_prompts(state, step, count)
        return sample_rows(state, step, rows, sampling), rows, state

    if not carry:
        return draw
    if server is not None:
        raise ValueError(f"carry_over = {carry}: a server's completions are not resumed; legal with one: 0")
    if lm.routing is not None:
        raise ValueError(
            "prompts carried over do not keep the experts that their tokens took; legal for a mixture: carry_over = 0"
        )
    n = batches.num_generations
    until_enough = sampling.replace(stop_after=(count + carry) * n - carry)

    def draw_and_carry(state: TrainState, step: int):
        carried = rollouts.carry_from_arrays(state.extra, prompts.columns_of, prompts.shaped_of)
        fresh = prompts.draw(state.cursor, count + carry if carried is None else count)
        columns = row_tokens(prompts, sampling)

        def draw_rows(rows: PromptBatch) -> Trajectory:
            return distributed.fetch(sample_rows(state, step, rows, until_enough))

        traj, rows, left = rollouts.partial_step(draw_rows, fresh, carried, n, carry, step, columns)
        return shard_rows(shardings, traj), rows, state.replace(extra=rollouts.carry_to_arrays(left))

    return draw_and_carry


def make_sample_scored(
    lm: LM, annotate: AnnotateFn, score: Score, sampling: Sampling, shardings: Shardings, seed: int
) -> Callable[..., Trajectory]:
    """sample_scored(state, prompts, step, other=None) -> annotated and scored completions of these prompts.

    `other`: (lm, parameters) of another policy that writes them, with keys of its own.
    """

    def sample_scored(
        state: TrainState, prompts: PromptBatch, step: int, other: tuple[LM, Params] | None = None
    ) -> Trajectory:
        writer, params = other or (lm, state.params)
        key_step = step if other is None else -2 - step  # -1 is that of evaluations
        traj = sample(writer, params, state.frozen, shard_prompts(shardings, prompts), sampling, seed, key_step)
        return score(annotate(state, traj), prompts)

    return sample_scored


def make_greedy_baseline(
    lm: LM, algorithm: Algorithm, score: Score, batches: Batches, sampling: Sampling, shardings: Shardings
) -> Callable[[TrainState, Trajectory, PromptBatch], Trajectory]:
    """fill(state, traj, prompts) -> traj with `baseline`, the reward of each prompt's greedy completion.

    An algorithm that does not need it (ReMax does) gets its trajectory back. Raises ValueError for prompts carried
    over: the greedy completion would be another policy's.
    """
    if "baseline" not in algorithm.needs:
        return lambda state, traj, prompts: traj
    if batches.carry_over:
        raise ValueError(
            f"carry_over = {batches.carry_over}: this algorithm compares a completion with the greedy one of the policy"
            " that sampled it; legal: 0"
        )
    greedy = greedy_of(sampling)

    def fill(state: TrainState, traj: Trajectory, prompts: PromptBatch) -> Trajectory:
        placed = shard_prompts(shardings, prompts)
        greedy_traj = score(sample(lm, state.params, state.frozen, placed, greedy, seed=0, step=0), prompts)
        rewards = jnp.sum(jnp.asarray(greedy_traj.rewards), axis=1)
        return traj.replace(baseline=jnp.repeat(rewards, batches.num_generations))

    return fill


def make_sample_in_pieces(
    lm: LM, prompts: PromptBatch, sampling: Sampling, shardings: Shardings, rows_at_once: int
) -> Callable[[TrainState, int], Iterator[Trajectory]]:
    """sample_pieces(state, seed) -> the completions of these prompts, about `rows_at_once` rows at a time.

    Pieces are of one shape, which divides over the devices. The last one is filled up with copies of the last prompt:
    of the rows of all pieces together the first len(prompts.number) * sampling.n count. The key is that of evaluations.
    """
    count = len(prompts.number)
    devices = data_parallel_size(shardings.rows.mesh, "rollout_rows")
    unit = devices // math.gcd(devices, sampling.n)  # prompts whose completions divide over the devices
    most = max(rows_at_once // (sampling.n * unit), 1) * unit
    size = -(-count // (math.ceil(count / most) * unit)) * unit

    def sample_pieces(state: TrainState, seed: int) -> Iterator[Trajectory]:
        for start in range(0, count, size):
            here = np.minimum(np.arange(start, start + size), count - 1)
            tokens, mask, number = (np.asarray(x)[here] for x in (prompts.tokens, prompts.mask, prompts.number))
            columns, shaped = ([side[i] for i in here] for side in (prompts.columns, prompts.as_read))
            piece = PromptBatch(tokens, mask, number, columns, prompts.cursor, shaped=shaped)
            yield sample(lm, state.params, state.frozen, shard_prompts(shardings, piece), sampling, seed, step=-1)

    return sample_pieces


MIXED = ("inputs", "actions", "logp", "mask", "positions", "segments", "temperature", "group")


def make_mix(
    policy_fraction: float, options: settings.Sampling, prompts: Prompts, seed: int
) -> Callable[[int, Callable[[], Trajectory], PromptBatch], Trajectory]:
    """mix(step, sampled, rows) -> sampled(), in which some rows are the file's completions of the same prompts.

    They are `prompts.completions`, cut where sampled ones would be. `policy_fraction`: probability that a row stays as
    it was sampled; with 0 nothing is sampled.
    """
    if policy_fraction == 1:
        return lambda step, sampled, rows: sampled()
    completions = [ids[: options.max_tokens] for ids in prompts.completions]

    def mix(step: int, sampled: Callable[[], Trajectory], rows: PromptBatch) -> Trajectory:
        given = demonstrations(rows, [completions[i] for i in prompts.indices_of(rows.number)], options.max_tokens)
        temperature = jnp.full_like(given.temperature, options.temperature)
        given = given.replace(temperature=temperature, group=jnp.asarray(rows.number))
        given = Trajectory(**{name: getattr(given, name) for name in MIXED})
        if policy_fraction == 0:
            return given
        traj = sampled()
        traj = Trajectory(**{name: getattr(traj, name) for name in MIXED})
        return mix_completions(jax.random.fold_in(jax.random.key(seed), step), traj, given, policy_fraction)

    return mix
