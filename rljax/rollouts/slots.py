"""Continuous batching in one compiled loop: W slots, R > W answers in a queue, a finished slot takes the next one.

The answers are those of the static batch: an answer's uniform numbers are its own, whichever slot it stands in. When
the queue is empty and half of the slots are idle, those at work move together and the loop goes on with half as many.
"""

import jax
import jax.numpy as jnp
from flax import struct

from rljax.ops import sampling as ops
from rljax.rollouts import draw as drawing
from rljax.rollouts.answers import Answers, Prompts, Work, read, unfinished
from rljax.rollouts.sample_token import Memory, Settings
from rljax.types import LM, Array, Sampling

FEWEST = 8  # slots: fewer rows take no less time


@struct.dataclass
class Queue:
    """The prompts as read, and the answers that wait for a slot: those that are not over from the start."""

    prompts: tuple  # cache, hidden [P D], memory
    source: Array  # [R] of each answer, its prompt
    order: Array  # [R] the answers that wait, in order; after `count` of them the others
    count: Array  # []

    @classmethod
    def of(cls, prompts: tuple, source: Array, over: Array) -> "Queue":
        return cls(prompts, source, jnp.argsort(over, stable=True), (~over).sum())

    def take(self, lm: LM, answers):
        """Cache, hidden states and memory of these answers' prompts."""
        return take(lm, self.prompts, self.source[answers])


@struct.dataclass
class Slots:
    """W answers under way, each at a column of its own."""

    cache: dict
    hidden: Array  # [W D]
    memory: Memory
    who: Array  # [W] the answer that stands there; R: none
    t: Array  # [W] columns of it drawn
    next: Array  # [] first in the queue
    answers: Answers  # R + 1 rows: idle slots write to the last
    experts: Array | None  # [R + 1 N M k] that each drawn token took (mixture models)
    work: Work


def draw_in_slots(lm: LM, prompts: Prompts, settings: Settings, sampling: Sampling):
    """All answers, sampling.max_concurrent at a time; the experts that prompts and answers took [R S M k] or None; the work."""
    R, W = len(settings.before), sampling.max_concurrent
    none = Answers.none(settings, sampling.max_tokens)
    queue = Queue.of(read(lm, prompts, sampling), prompts.answers(sampling.n)[0], none.over)
    first = queue.order[:W]
    cache, hidden, memory = queue.take(lm, first)
    spare = jax.tree.map(lambda x: jnp.pad(x, ((0, 1),) + ((0, 0),) * (x.ndim - 1)), none)
    state = Slots(
        cache=lm.grow(cache, sampling.max_tokens),
        hidden=hidden,
        memory=memory,
        who=jnp.where(jnp.arange(W) < queue.count, first, R),
        t=jnp.zeros(W, jnp.int32),
        next=jnp.int32(W),
        answers=spare,
        experts=_no_experts(lm, queue, (R + 1, sampling.max_tokens)),
        work=Work(*(jnp.int32(0),) * 3),
    )
    while True:
        state = run(lm, state, queue, settings, sampling, idle=W // 2 if W >= 2 * FEWEST else W)
        if W < 2 * FEWEST:
            break
        W //= 2
        state = halve(lm, state, W)
    answers = jax.tree.map(lambda x: x[:R], state.answers)
    experts = state.experts
    if experts is not None:
        experts = jnp.concatenate([lm.routing(queue.prompts[0])[queue.source], experts[:R]], axis=1)
    return answers, experts, state.work.replace(tokens=answers.drawn.sum())


def _no_experts(lm: LM, queue: Queue, shape: tuple[int, int]):
    if lm.routing is None:
        return None
    of_prompts = jax.eval_shape(lm.routing, queue.prompts[0])
    return jnp.zeros((*shape, *of_prompts.shape[2:]), of_prompts.dtype)


def take(lm: LM, these, rows):
    """Some rows of a cache with its hidden states and memory."""
    cache, hidden, memory = these
    return lm.gather(cache, rows), hidden[rows], jax.tree.map(lambda x: x[rows], memory)


def run(lm: LM, state: Slots, queue: Queue, settings: Settings, sampling: Sampling, idle: int) -> Slots:
    """Until the queue is empty and so many slots are idle, or nothing is left to draw."""
    R = len(settings.before)

    def goes_on(state: Slots):
        busy = (state.next < queue.count) | ((state.who == R).sum() < idle)
        return busy & unfinished(state.answers, R, sampling)

    def one(state: Slots):
        return step(lm, refill(lm, state, queue), settings, sampling)

    return jax.lax.while_loop(goes_on, one, state)


def refill(lm: LM, state: Slots, queue: Queue) -> Slots:
    """Idle slots take answers from the queue, one after the other."""
    R = len(queue.order)

    def free(state: Slots):
        return (state.next < queue.count) & (state.who == R).any()

    def fill(state: Slots):
        slot = ops.argmax((state.who == R).astype(jnp.float32))[None]
        answer = queue.order[state.next][None]
        cache, hidden, memory = queue.take(lm, answer)
        return state.replace(
            cache=lm.scatter(state.cache, slot, cache),
            hidden=state.hidden.at[slot].set(hidden),
            memory=jax.tree.map(lambda x, y: x.at[slot].set(y), state.memory, memory),
            who=state.who.at[slot].set(answer),
            t=state.t.at[slot].set(0),
            next=state.next + 1,
        )

    return jax.lax.while_loop(free, fill, state)


def step(lm: LM, state: Slots, settings: Settings, sampling: Sampling) -> Slots:
    """One token in each slot that is at work."""
    R, who, t, a = len(settings.before), state.who, state.t, state.answers
    mine, going = settings.of(jnp.minimum(who, R - 1)), who < R
    token, logp, ended, over, memory = drawing.draw(lm.logits(state.hidden), t, mine, state.memory, sampling)
    answers = Answers(
        tokens=a.tokens.at[who, t].set(token),
        logp=a.logp.at[who, t].set(logp),
        drawn=a.drawn.at[who].add(going),
        ended=a.ended.at[who].set(ended),
        over=a.over.at[who].set(over),
    )
    new = (going & ~over).astype(jnp.int32)[:, None]
    hidden, cache = lm.forward(token[:, None] * new, (mine.length + t)[:, None], new, state.cache)
    experts = state.experts
    if experts is not None:  # of the column just written, which every row counts from the end of its prompt
        taken = lm.routing(cache)
        column = taken.shape[1] - sampling.max_tokens + t
        experts = experts.at[who, t].set(taken[jnp.arange(len(who)), column])
    work = state.work.replace(steps=state.work.steps + 1, row_steps=state.work.row_steps + len(who))
    return state.replace(
        cache=cache,
        hidden=hidden[:, 0],
        memory=memory,
        who=jnp.where(over, R, who),
        t=t + 1,
        answers=answers,
        experts=experts,
        work=work,
    )


def halve(lm: LM, state: Slots, slots: int) -> Slots:
    """The slots at work in a batch of half the size."""
    R = len(state.answers.over) - 1
    kept = jnp.argsort(state.who == R)[:slots]
    cache, hidden, memory = take(lm, (state.cache, state.hidden, state.memory), kept)
    return state.replace(cache=cache, hidden=hidden, memory=memory, who=state.who[kept], t=state.t[kept])
