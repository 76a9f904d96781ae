"""Continuous batching in one compiled loop: W slots, R > W completions; a finished slot takes the next in the queue.

The completions are those of the static batch: a completion's uniform numbers are its own, whichever slot it is in.
Columns are added to the caches when a completion needs them, since attention reads all there are. When the queue is
empty and half of the slots are idle, the active ones are moved together and the loop goes on with half as many, as long
as each device has a slot.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import struct

from rljax.ops import sampling as ops
from rljax.rollouts.decode_state import Completions, DecodeStats, Prefilled, gather_prefilled, should_continue
from rljax.rollouts.sample_token import PenaltyState, SamplingSettings, sample_token
from rljax.types import LM, Array, Sampling

MIN_SLOTS = 8  # fewer rows take no less time
INITIAL_COLUMNS = 128  # of completions in the caches at first; doubled when one is longer. Each is compiled separately


@struct.dataclass
class Queue:
    """The prompts after prefill, and the completions that wait for a slot: those that are not done from the start."""

    prefilled: Prefilled
    source: Array  # [R] row of each completion's prompt
    order: Array  # [R] completions that wait, in order; after `count` of them the others
    count: Array  # []


@struct.dataclass
class SlotState:
    """W completions in progress, each at a column of its own."""

    cache: dict
    hidden: Array  # [W D] of the last token
    penalties: PenaltyState
    slot_row: Array  # [W] the completion in each slot; R: the slot is idle
    t: Array  # [W] columns of it sampled
    next: Array  # [] place in the queue of the next completion
    completions: Completions  # R + 1 rows: idle slots write to the last
    experts: Array | None  # [R + 1 N M k] experts of each sampled token (mixture models)
    stats: DecodeStats
    columns: int = struct.field(pytree_node=False)  # of the cache, for tokens of completions


def decode_in_slots(
    lm: LM, prefilled: Prefilled, source: Array, settings: SamplingSettings, sampling: Sampling
) -> tuple[Completions, Array | None, DecodeStats]:
    """All completions, sampling.max_concurrent at a time.

    Returns them, the experts of all tokens but the last of each (as `sampler.decode` does), and the stats.
    """
    R = len(source)
    completions = Completions.empty(settings, sampling)
    queue = Queue(
        prefilled=prefilled,
        source=source,
        order=jnp.argsort(completions.done, stable=True),
        count=(~completions.done).sum(),
    )
    state = init_slots(lm, queue, completions, sampling)
    for slots, fewer in itertools.pairwise([*slot_counts(lm, sampling.max_concurrent), 0]):
        state = decode_until_idle(lm, state, queue, settings, sampling, num_idle=slots - fewer)
        while state.columns < sampling.max_tokens:
            state = add_columns(lm, state, min(2 * state.columns, sampling.max_tokens))
            state = decode_until_idle(lm, state, queue, settings, sampling, num_idle=slots - fewer)
        if fewer:
            state = compact_slots(lm, state, fewer)
    completions = jax.tree.map(lambda x: x[:R], state.completions)
    experts = state.experts
    if experts is not None:
        of_prompts = lm.routing(prefilled.cache)[source]
        experts = jnp.concatenate([of_prompts, experts[:R, :-1]], axis=1)
    return completions, experts, state.stats.replace(tokens=completions.num_tokens.sum())


def slot_counts(lm: LM, most: int) -> list[int]:
    """How many slots there are, one count after the other: halves, at least MIN_SLOTS and equally many a device."""
    counts = [most]
    while (half := counts[-1] // 2) >= max(MIN_SLOTS, lm.row_shards) and half % lm.row_shards == 0:
        counts.append(half)
    return counts


def init_slots(lm: LM, queue: Queue, completions: Completions, sampling: Sampling) -> SlotState:
    """The first completions of the queue in the slots."""
    R = len(queue.order)
    W = sampling.max_concurrent
    first = queue.order[:W]
    prompts = gather_prefilled(lm, queue.prefilled, queue.source[first])
    zero = jnp.int32(0)
    columns = min(INITIAL_COLUMNS, sampling.max_tokens)
    return SlotState(
        cache=lm.grow(prompts.cache, columns),
        hidden=prompts.hidden,
        penalties=prompts.penalties,
        slot_row=jnp.where(jnp.arange(W) < queue.count, first, R),
        t=jnp.zeros(W, jnp.int32),
        next=jnp.int32(W),
        completions=jax.tree.map(_append_row, completions),
        experts=_empty_experts(lm, queue, (R + 1, sampling.max_tokens)),
        stats=DecodeStats(steps=zero, row_steps=zero, tokens=zero),
        columns=columns,
    )


def add_columns(lm: LM, state: SlotState, columns: int) -> SlotState:
    """The same slots, with room for completions of so many tokens."""
    return state.replace(cache=lm.grow(state.cache, columns - state.columns), columns=columns)


def _append_row(x):
    return jnp.pad(x, ((0, 1),) + ((0, 0),) * (x.ndim - 1))


def _empty_experts(lm: LM, queue: Queue, shape: tuple[int, int]) -> Array | None:
    if lm.routing is None:
        return None
    of_prompts = jax.eval_shape(lm.routing, queue.prefilled.cache)
    return jnp.zeros((*shape, *of_prompts.shape[2:]), of_prompts.dtype)


def decode_until_idle(
    lm: LM, state: SlotState, queue: Queue, settings: SamplingSettings, sampling: Sampling, num_idle: int
) -> SlotState:
    """Decode until the queue is empty and so many slots are idle, a cache is full, or nothing is left to sample."""
    R = len(queue.order)

    def condition(state: SlotState):
        idle = state.slot_row == R
        busy = (state.next < queue.count) | (idle.sum() < num_idle)
        has_room = (idle | (state.t < state.columns)).all()
        return busy & has_room & should_continue(state.completions, R, sampling)

    def body(state: SlotState):
        state = refill_slots(lm, state, queue)
        return decode_slots(lm, state, settings, sampling)

    return jax.lax.while_loop(condition, body, state)


def refill_slots(lm: LM, state: SlotState, queue: Queue) -> SlotState:
    """Idle slots take completions from the queue, one after the other."""
    R = len(queue.order)

    def can_refill(state: SlotState):
        return (state.next < queue.count) & (state.slot_row == R).any()

    def refill_one(state: SlotState):
        idle = state.slot_row == R
        slot = ops.argmax(idle.astype(jnp.float32))[None]
        completion = queue.order[state.next][None]
        prompt = gather_prefilled(lm, queue.prefilled, queue.source[completion])
        return state.replace(
            cache=lm.scatter(state.cache, slot, prompt.cache),
            hidden=state.hidden.at[slot].set(prompt.hidden),
            penalties=jax.tree.map(lambda x, y: x.at[slot].set(y), state.penalties, prompt.penalties),
            slot_row=state.slot_row.at[slot].set(completion),
            t=state.t.at[slot].set(0),
            next=state.next + 1,
        )

    return jax.lax.while_loop(can_refill, refill_one, state)


def decode_slots(lm: LM, state: SlotState, settings: SamplingSettings, sampling: Sampling) -> SlotState:
    """One token in each active slot, and one forward pass of all slots."""
    R = len(settings.resumed_length)
    row = state.slot_row
    t = state.t
    active = row < R
    slot_settings = settings.take(jnp.minimum(row, R - 1))
    new = sample_token(lm.logits(state.hidden), t, slot_settings, state.penalties, sampling)
    old = state.completions
    completions = Completions(
        tokens=old.tokens.at[row, t].set(new.token),
        logp=old.logp.at[row, t].set(new.logp),
        num_tokens=old.num_tokens.at[row].add(active),
        terminated=old.terminated.at[row].set(new.terminated),
        done=old.done.at[row].set(new.done),
        support=None if old.support is None else old.support.at[row, t].set(new.support),
    )
    segments = (active & ~new.done).astype(jnp.int32)[:, None]  # an idle slot writes padding
    positions = (slot_settings.context_length + t)[:, None]
    hidden, cache = lm.forward(new.token[:, None] * segments, positions, segments, state.cache)
    experts = state.experts
    if experts is not None:  # of the column just written, which every row counts from the end of its prompt
        of_all = lm.routing(cache)
        column = of_all.shape[1] - state.columns + t
        experts = experts.at[row, t].set(of_all[jnp.arange(len(row)), column])
    stats = state.stats.replace(steps=state.stats.steps + 1, row_steps=state.stats.row_steps + len(row))
    return state.replace(
        cache=cache,
        hidden=hidden[:, 0],
        penalties=new.penalties,
        slot_row=jnp.where(new.done, R, row),
        t=t + 1,
        completions=completions,
        experts=experts,
        stats=stats,
    )


def compact_slots(lm: LM, state: SlotState, num_slots: int) -> SlotState:
    """The active slots in a batch of fewer slots."""
    R = len(state.completions.done) - 1
    kept = jnp.argsort(state.slot_row == R)[:num_slots]
    rows = gather_prefilled(lm, Prefilled(state.cache, state.hidden, state.penalties), kept)
    return state.replace(
        cache=rows.cache,
        hidden=rows.hidden,
        penalties=rows.penalties,
        slot_row=state.slot_row[kept],
        t=state.t[kept],
    )
