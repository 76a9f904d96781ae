"""Answers while they are drawn: the static batch of `rollouts.tokens` in compiled pieces, for whoever reads along."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from rljax.rollouts import draw as drawing
from rljax.rollouts import tokens
from rljax.rollouts.answers import Answers, Prompts, bind, place, settle, unfinished
from rljax.rollouts.sample_token import Settings
from rljax.rollouts.sampler import Decoding
from rljax.types import LM, Params, Rows, Sampling

ROOM = 128  # columns of the cache at first; when they are full there are twice as many. Each number is compiled apart


def stream(
    lm: LM, params: Params, frozen: Params, rows: Rows, sampling: Sampling, seed: int, step: int, every: int = 16
) -> Iterator[Answers]:
    """The answers that `sample` draws, each time that `every` columns (at most) are new, on the host.

    The last ones are whole. A stretch of columns is one call of a program compiled once for each size of the cache,
    whatever `every` is. Raises ValueError for parameters out of range, and for max_concurrent: all rows are drawn at once.
    """
    drawing.check(sampling)
    if sampling.max_concurrent is not None or every < 1:
        raise ValueError(
            f"max_concurrent = {sampling.max_concurrent}, every = {every}; legal in a stream: max_concurrent=None, every at least 1"
        )
    params, frozen = _prepare(lm, params, frozen)
    lm = lm._replace(prepare=None)
    end, room = 0, min(ROOM, sampling.max_tokens)
    state, settings = _begin(lm, params, frozen, place(rows, step), sampling, jnp.int32(seed), room)
    while True:
        if end == room:
            more = min(room, sampling.max_tokens - room)
            state, room = _grow(lm, state, more), room + more
        end = min(end + every, room)
        state = _advance(lm, params, frozen, state, settings, sampling, end)
        answers = jax.device_get(state.answers)
        yield answers
        if end == sampling.max_tokens or not unfinished(answers, len(answers.over), sampling):
            return


@partial(jax.jit, static_argnames="lm")
def _prepare(lm, params, frozen):
    return (params, frozen) if lm.prepare is None else lm.prepare(params, frozen)


@partial(jax.jit, static_argnames=("lm", "columns"))
def _begin(lm, params, frozen, prompts: Prompts, sampling, seed, columns: int) -> tuple[Decoding, Settings]:
    settings = settle(prompts, sampling, seed)
    return tokens.begin(bind(lm, params, frozen), prompts, settings, sampling, columns), settings


@partial(jax.jit, static_argnames=("lm", "columns"))
def _grow(lm, state: Decoding, columns: int) -> Decoding:
    return state.replace(cache=lm.grow(state.cache, columns))


@partial(jax.jit, static_argnames="lm", donate_argnames="state")
def _advance(lm, params, frozen, state: Decoding, settings: Settings, sampling, end) -> Decoding:
    return tokens.advance(bind(lm, params, frozen), state, settings, sampling, end)
