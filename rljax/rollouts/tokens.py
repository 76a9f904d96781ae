"""The token sampler: each prompt read once, its keys and values shared by its answers, decoding in one compiled loop.

Log-probs are captured as tokens are drawn, by the same function that the trainer uses, at the sampling temperature and
of the untruncated distribution. The loop ends when every row has met a stop token. Columns are added to the cache a
stretch at a time, so that attention reads what is filled and little more.

`sampling.max_concurrent` draws the same answers a few rows at a time (`rollouts.slots`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rljax.rollouts import draw as drawing
from rljax.rollouts.answers import Answers, Prompts, Work, bind, place, read, settle, trajectory, unfinished
from rljax.rollouts.sample_token import Memory, Settings
from rljax.rollouts.slots import draw_in_slots
from rljax.types import LM, Array, Params, Rows, Sampling, Trajectory

STRETCH, STRETCHES = 16, 8  # columns at least, stretches at most: each is compiled apart


def sample(lm: LM, params: Params, frozen: Params, rows: Rows, sampling: Sampling, seed: int, step: int) -> Trajectory:
    """Draw sampling.n answers to each of P prompts: B = P·n rows, row p·n + g being answer g to prompt p.

    With `rows.requests` the answers named there. T = L + max_tokens - 1. `group` is the prompt's number; `terminated`
    marks the decision that ended an answer, `truncated` the last one of an answer that reached max_tokens; an answer
    that `stop_after` cut short has neither. The same (seed, step, rows.number, g) gives the same answer whatever else is
    in the batch. Raises ValueError for parameters out of range.
    """
    return sample_and_count(lm, params, frozen, rows, sampling, seed, step)[0]


def sample_and_count(
    lm: LM, params: Params, frozen: Params, rows: Rows, sampling: Sampling, seed: int, step: int
) -> tuple[Trajectory, Work]:
    """`sample`, and what it took."""
    drawing.check(sampling)
    return _sample(lm, params, frozen, place(rows, step), sampling, jnp.int32(seed))


@partial(jax.jit, static_argnames="lm")
def _sample(lm, params, frozen, prompts: Prompts, sampling: Sampling, seed):
    lm = bind(lm, params, frozen)
    source, _ = prompts.answers(sampling.n)
    settings = settle(prompts, sampling, seed)
    if sampling.max_concurrent is not None and sampling.max_concurrent < len(source):
        answers, routing, work = draw_in_slots(lm, prompts, settings, sampling)
        return trajectory(prompts, settings, sampling, answers, routing), work
    first, *more = stretches(sampling.max_tokens)
    state = advance(lm, begin(lm, prompts, settings, sampling, first), settings, sampling, first)
    end = first
    for columns in more:
        end += columns
        state = advance(lm, state.replace(cache=lm.grow(state.cache, columns)), settings, sampling, end)
    routing = None if lm.routing is None else lm.routing(state.cache)
    work = Work(state.t, state.t * len(source), state.answers.drawn.sum())
    return trajectory(prompts, settings, sampling, state.answers, routing), work


def stretches(columns: int) -> list[int]:
    """Numbers of columns that add up to `columns`."""
    each = max(STRETCH, -(-columns // STRETCHES))
    return [min(each, columns - start) for start in range(0, columns, each)]


@struct.dataclass
class Decoding:
    """R answers under way, all of them at the same column."""

    cache: dict
    hidden: Array  # [R D] after the last token
    answers: Answers
    memory: Memory
    t: Array  # [] columns drawn


def begin(lm: LM, prompts: Prompts, settings: Settings, sampling: Sampling, columns: int) -> Decoding:
    """The prompts read, and room for so many columns."""
    cache, hidden, memory = read(lm, prompts, sampling)
    source, _ = prompts.answers(sampling.n)
    if prompts.requests is None:  # neighbours: nothing is copied, and on a mesh nothing moves
        cache, hidden = lm.fork(cache, sampling.n, columns), jnp.repeat(hidden, sampling.n, axis=0)
    else:
        cache, hidden = lm.grow(lm.gather(cache, source), columns), hidden[source]
    memory = jax.tree.map(lambda x: x[source], memory)
    return Decoding(cache, hidden, Answers.none(settings, sampling.max_tokens), memory, jnp.int32(0))


def advance(lm: LM, state: Decoding, settings: Settings, sampling: Sampling, end) -> Decoding:
    """Draws up to column `end`, for which the cache has room; less where all answers are over, or enough of them."""

    def more(state: Decoding):
        return (state.t < end) & unfinished(state.answers, len(settings.before), sampling)

    def one(state: Decoding):
        a, t = state.answers, state.t
        going = ~a.over
        token, logp, ended, over, memory = drawing.draw(lm.logits(state.hidden), t, settings, state.memory, sampling)
        over = a.over | over
        answers = Answers(
            tokens=a.tokens.at[:, t].set(jnp.where(going, token, 0)),
            logp=a.logp.at[:, t].set(jnp.where(going, logp, 0.0)),
            drawn=a.drawn + going,
            ended=a.ended | (going & ended),
            over=over,
        )
        new = (~over).astype(jnp.int32)[:, None]
        hidden, cache = lm.forward(token[:, None] * new, (settings.length + t)[:, None], new, state.cache)
        return Decoding(cache, hidden[:, 0], answers, memory, t + 1)

    return jax.lax.while_loop(more, one, state)
