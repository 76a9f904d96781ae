"""Completions while they are sampled: the static batch of `sampler.py`, in compiled pieces."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from rljax.rollouts import sampler
from rljax.rollouts.decode_state import Completions, should_continue
from rljax.rollouts.sample_token import SamplingSettings, check_sampling
from rljax.rollouts.sampler import DecodeState, DevicePrompts
from rljax.types import LM, Params, PromptBatch, Sampling

INITIAL_CAPACITY = 128  # columns of the cache at first; doubled when full. Each capacity is compiled separately


def stream(
    lm: LM, params: Params, frozen: Params, rows: PromptBatch, sampling: Sampling, seed: int, step: int, every: int = 16
) -> Iterator[Completions]:
    """The completions of `sample` on the host, so far, after every `every` new columns (at most).

    The last ones yielded are finished. The columns between two yields are one call of a program that is compiled once
    for each capacity of the cache, whatever `every` is. For several batches of one policy prepare the model before the
    first (`sampler.prepare_once`): it is not prepared again.

    Raises ValueError for parameters out of range, and for max_concurrent: all rows are sampled at once.
    """
    check_sampling(sampling)
    if sampling.max_concurrent is not None or every < 1:
        given = f"max_concurrent = {sampling.max_concurrent}, every = {every}"
        raise ValueError(f"{given}; legal in a stream: max_concurrent=None, every at least 1")
    lm, params, frozen = sampler.prepare_once(lm, params, frozen)
    prompts = sampler.to_device(rows, step)
    capacity = min(INITIAL_CAPACITY, sampling.max_tokens)
    state, settings = _prefill(lm, params, frozen, prompts, sampling, jnp.int32(seed), capacity)
    end = 0
    while True:
        if end == capacity:
            added = min(capacity, sampling.max_tokens - capacity)
            state = _grow(lm, state, added)
            capacity += added
        end = min(end + every, capacity)
        state = _decode_until(lm, params, frozen, state, settings, sampling, end)
        completions = jax.device_get(state.completions)
        yield completions
        if end == sampling.max_tokens or not should_continue(completions, len(completions.done), sampling):
            return


@partial(jax.jit, static_argnames=("lm", "columns"))
def _prefill(
    lm, params, frozen, prompts: DevicePrompts, sampling, seed, columns: int
) -> tuple[DecodeState, SamplingSettings]:
    lm = sampler.bind_params(lm, params, frozen)
    settings = sampler.sampling_settings(prompts, sampling, seed)
    prefilled = sampler.prefill(lm, prompts, sampling)
    return sampler.init_decode_state(lm, prompts, prefilled, settings, sampling, columns), settings


@partial(jax.jit, static_argnames=("lm", "columns"))
def _grow(lm, state: DecodeState, columns: int) -> DecodeState:
    return state.replace(cache=lm.grow(state.cache, columns))


@partial(jax.jit, static_argnames="lm", donate_argnames="state")
def _decode_until(lm, params, frozen, state: DecodeState, settings: SamplingSettings, sampling, end) -> DecodeState:
    lm = sampler.bind_params(lm, params, frozen)
    return sampler.decode_until(lm, state, settings, sampling, end)
