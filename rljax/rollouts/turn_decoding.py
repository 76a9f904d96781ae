"""The compiled part of `conversations.py`: W slots, each with a conversation at a column and in a turn of its own.

    read_tokens    a chunk of tokens into each slot's cache: a prompt, or what the environment added since the last turn
    admit          conversations begin in slots, each with a copy of its prompt's keys and values
    decode_turns   one token a step in every slot that is in a turn, until few enough are left in one

Column j of a slot's cache is token j of its conversation: whatever padding a call writes is taken off again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rljax.rollouts import sampler
from rljax.rollouts.decode_state import empty_support
from rljax.rollouts.sample_token import PenaltyState, SamplingSettings, sample_token
from rljax.rollouts.sampler import DevicePrompts
from rljax.types import LM, Array, Params, Sampling


@struct.dataclass
class TurnTokens:
    """What each of W slots has sampled in its present turn, N = max_tokens columns."""

    tokens: Array  # [W N]
    logp: Array  # [W N]
    support: Array | None  # [W N k]
    count: Array  # [W] tokens sampled
    terminated: Array  # [W] bool: a stop token or stop string was met
    running: Array  # [W] bool: in the middle of the turn


@struct.dataclass
class TurnState:
    """W slots between two compiled calls."""

    cache: dict
    length: Array  # [W] tokens of the conversation in the cache: all, but for the last of a complete turn
    hidden: Array  # [W D] of the last of them
    penalties: PenaltyState
    turn: TurnTokens
    columns: int = struct.field(pytree_node=False)  # of the cache


@partial(jax.jit, static_argnames=("lm", "rows", "columns"))
def empty_slots(lm: LM, params: Params, frozen: Params, sampling: Sampling, rows: int, columns: int) -> TurnState:
    """So many slots without a conversation, with caches of so many columns."""
    lm = sampler.bind_params(lm, params, frozen)
    cache = lm.init_cache(rows, columns)
    one = jnp.zeros((rows, 1), jnp.int32)
    hidden = jax.eval_shape(lm.forward, one, one, one, cache)[0]
    vocabulary = jax.eval_shape(lm.logits, hidden).shape[-1]
    zero = jnp.zeros(rows, jnp.int32)
    shape = (rows, sampling.max_tokens)
    return TurnState(
        cache=cache,
        length=zero,
        hidden=jnp.zeros(hidden.shape[::2], hidden.dtype),
        penalties=PenaltyState(
            seen=None if sampling.repetition_penalty is None else jnp.zeros((rows, vocabulary), bool),
            stop_state=None if sampling.stop_strings is None else zero,
        ),
        turn=TurnTokens(
            tokens=jnp.zeros(shape, jnp.int32),
            logp=jnp.zeros(shape),
            support=empty_support(shape, sampling.support),
            count=zero,
            terminated=zero.astype(bool),
            running=zero.astype(bool),
        ),
        columns=columns,
    )


@partial(jax.jit, static_argnames=("lm", "columns"))
def grow_slots(lm: LM, state: TurnState, columns: int) -> TurnState:
    """The same slots, with caches of so many columns."""
    return state.replace(cache=lm.grow(state.cache, columns - state.columns), columns=columns)


@partial(jax.jit, static_argnames="lm", donate_argnames="state")
def read_tokens(
    lm: LM, params: Params, frozen: Params, state: TurnState, tokens: Array, count: Array, start: Array
) -> TurnState:
    """The first count[w] of tokens[w] [W T] into the cache of slot w, from column start[w] on; later columns are freed.

    A slot with count 0 keeps all that it has. Every cache needs room for T more columns.
    """
    lm = sampler.bind_params(lm, params, frozen)
    reads = count > 0
    start = jnp.where(reads, start, state.length)
    columns = jnp.arange(tokens.shape[1])[None]
    real = columns < count[:, None]
    positions = jnp.where(real, start[:, None] + columns, 0)
    cache = lm.crop(state.cache, start)
    hidden, cache = lm.forward(tokens * real, positions, real.astype(jnp.int32), cache)
    row = jnp.arange(len(count))
    seen = state.penalties.seen
    if seen is not None:
        seen = seen & ~(reads & (start == 0))[:, None]  # of the conversation that had the slot before
        seen = seen.at[row[:, None], tokens].max(real)
    return state.replace(
        cache=lm.crop(cache, start + count),
        length=start + count,
        hidden=jnp.where(reads[:, None], hidden[row, count - 1], state.hidden),
        penalties=state.penalties.replace(seen=seen),
    )


@partial(jax.jit, static_argnames="lm", donate_argnames="state")
def admit(lm: LM, state: TurnState, prompts: TurnState, source: Array, begins: Array) -> TurnState:
    """In the slots w where begins[w], the conversation that prompt source[w] begins."""
    slots = jnp.where(begins, jnp.arange(len(begins)), len(begins))  # beyond the last: nothing is written

    def fill(x, y):
        return x.at[slots].set(y[source])

    return state.replace(
        cache=lm.scatter(state.cache, slots, lm.gather(prompts.cache, source)),
        length=fill(state.length, prompts.length),
        hidden=fill(state.hidden, prompts.hidden),
        penalties=jax.tree.map(fill, state.penalties, prompts.penalties),
    )


@partial(jax.jit, static_argnames=("lm", "max_context"), donate_argnames="state")
def decode_turns(
    lm: LM,
    params: Params,
    frozen: Params,
    state: TurnState,
    prompts: DevicePrompts,
    sampling: Sampling,
    seed: Array,
    sampled: Array,
    begins: Array,
    most_running: Array,
    max_context: int,
) -> TurnState:
    """Sample until at most `most_running` slots are in the middle of a turn. A turn also ends with the context.

    Args:
      prompts: its requests are the conversations of the slots, [W 2]. sampled: [W] tokens of earlier turns.
      begins: [W] bool: a turn begins in the slot.
    """
    lm = sampler.bind_params(lm, params, frozen)
    settings = sampler.sampling_settings(prompts, sampling, seed, sampled)
    state = begin_turns(state, begins)

    def condition(state: TurnState):
        return state.turn.running.sum() > most_running

    def body(state: TurnState):
        return decode_column(lm, state, settings, sampling, max_context)

    return jax.lax.while_loop(condition, body, state)


def begin_turns(state: TurnState, begins: Array) -> TurnState:
    """The state with a new turn in some of the slots. A stop string lies within one turn."""
    stop_state = state.penalties.stop_state
    return state.replace(
        penalties=state.penalties.replace(stop_state=None if stop_state is None else jnp.where(begins, 0, stop_state)),
        turn=state.turn.replace(
            count=jnp.where(begins, 0, state.turn.count),
            terminated=state.turn.terminated & ~begins,
            running=state.turn.running | begins,
        ),
    )


def decode_column(
    lm: LM, state: TurnState, settings: SamplingSettings, sampling: Sampling, max_context: int
) -> TurnState:
    """One token in each slot that is in a turn, and one forward pass of all. The last token of a turn is not read."""
    old = state.turn
    row = jnp.arange(len(old.count))
    new = sample_token(lm.logits(state.hidden), old.count, settings, state.penalties, sampling)
    done = new.done | (state.length + 1 >= max_context)
    column = jnp.where(old.running, old.count, sampling.max_tokens)  # beyond the last: nothing is written
    turn = TurnTokens(
        tokens=old.tokens.at[row, column].set(new.token),
        logp=old.logp.at[row, column].set(new.logp),
        support=None if old.support is None else old.support.at[row, column].set(new.support),
        count=old.count + old.running,
        terminated=jnp.where(old.running, new.terminated, old.terminated),
        running=old.running & ~done,
    )
    segments = turn.running.astype(jnp.int32)
    positions = state.length * segments
    hidden, cache = lm.forward((new.token * segments)[:, None], positions[:, None], segments[:, None], state.cache)
    length = state.length + segments

    def keep(new, old, where):
        return jnp.where(where.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return state.replace(
        cache=lm.crop(cache, length),
        length=length,
        hidden=keep(hidden[:, 0], state.hidden, turn.running),
        penalties=jax.tree.map(partial(keep, where=old.running), new.penalties, state.penalties),
        turn=turn,
    )
