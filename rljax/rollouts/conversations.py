"""Conversations of several turns: the policy writes, the environment answers, the policy goes on.

A conversation is a row of token ids that only grows: what was sampled stays as it was sampled, what the environment
adds is appended, and no token is ever decoded and encoded again. A turn is sampled as a completion is: the k-th token
that the policy samples in a conversation has the key (seed, step, prompt, completion, k), whatever stands between its
turns. So the same conversation comes out whatever else is in the batch, if its environment answers the same.

    cache="kept"      keys and values of a conversation stay between its turns; only what was added is read
    cache="prefill"   the whole conversation is read again before each turn: slower, and otherwise the same

Each of `sampling.max_concurrent` slots holds a conversation. When half of their turns are complete the environment is
asked to answer those, while the others pause in the middle of theirs; a conversation that has ended leaves its slot to
the next one. Tokens are read in chunks whose widths are powers of two, so that few programs are compiled. The compiled
part is `turn_decoding.py`; what happened so far is kept in a `ConversationRecord`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops.shapes import power_of_two
from rljax.rollouts import sampler, turn_decoding
from rljax.rollouts.conversation_record import ConversationCounts, ConversationRecord, begin_record
from rljax.rollouts.sample_token import check_logp, check_sampling
from rljax.rollouts.sampler import DevicePrompts
from rljax.rollouts.turn_decoding import TurnState, TurnTokens
from rljax.types import LM, Array, Observation, Params, PromptBatch, RespondFn, Sampling, Trajectory, Turn

MIN_CHUNK = 16  # tokens of the widest chunk: a quarter of the context, but between these
MAX_CHUNK = 512
INITIAL_COLUMNS = 128  # of the caches at first; doubled when full, since attention reads them all. Each is compiled


def sample_conversations(
    lm: LM,
    params: Params,
    frozen: Params,
    prompts: PromptBatch,
    respond: RespondFn,
    sampling: Sampling,
    seed: int,
    step: int,
    *,
    max_turns: int,
    max_context: int,
    cache: Literal["kept", "prefill"] = "kept",
) -> tuple[Trajectory, ConversationCounts]:
    """Sample sampling.n conversations with each of P prompts: B = P·n rows of T = max_context - 1 decisions.

    Row p·n + g is conversation g of prompt p, from the first column on. `mask` marks the tokens that the policy chose.
    The last of each turn has the turn's reward and is marked in `step_ends`; the last of a conversation is `terminated`
    where the environment said so, else `truncated`: by the environment, after max_turns, or because the row is full.

    Args:
      respond: answers to the complete turns of some conversations, until each has ended. A prompt ends where the policy
        is to write, and so does each observation.
      sampling: max_tokens, min_tokens and stop strings are those of a turn.
      max_turns: after so many a conversation is truncated, unless the environment terminates it.
      max_context: tokens of a row, prompt and observations included.

    Raises ValueError for parameters out of range, and where `respond` breaks its contract.
    """
    _check(prompts, sampling, max_turns, max_context, cache)
    lm, params, frozen = sampler.prepare_once(lm, params, frozen)
    engine = _Engine(lm, params, frozen, sampler.to_device(prompts, step), sampling, jnp.int32(seed), max_context)
    record = begin_record(prompts, sampling, max_context)
    B = len(record.length)
    slots = np.full(min(sampling.max_concurrent or B, B), -1)  # the conversation in each slot, -1: none
    state = engine.empty_state(len(slots))
    respond = _checked(respond, engine.vocabulary(state))
    read_prompts = engine.read_prompts(record) if cache == "kept" else None
    waiting = list(range(B))
    begins = np.zeros(len(slots), bool)  # the slots in which a turn is to begin
    while waiting or (slots >= 0).any():
        fresh = _fill_slots(slots, waiting)
        begins |= fresh
        state = engine.make_room(state, record, slots)
        if read_prompts is not None and fresh.any():
            state = turn_decoding.admit(lm, state, read_prompts, np.maximum(slots, 0) // sampling.n, fresh)
        state = engine.read(state, record, slots, begins, from_the_start=read_prompts is None)
        state = engine.decode(state, record, slots, begins)
        complete = (slots >= 0) & ~np.asarray(state.turn.running)
        turns = _take_turns(record, state.turn, slots, complete)
        ended = complete & np.isin(slots, _answer_turns(record, respond, turns, max_turns))
        engine.keep_routing(state, record, slots, ended)
        slots[ended] = -1
        begins = complete & ~ended
    source = np.repeat(np.arange(len(prompts.number)), sampling.n)
    temperature = np.broadcast_to(np.asarray(sampling.temperature, np.float32), len(prompts.number))
    return record.trajectory(np.asarray(prompts.number)[source], temperature[source]), record.counts


def _check(prompts: PromptBatch, sampling: Sampling, max_turns: int, max_context: int, cache: str) -> None:
    check_sampling(sampling)
    check_logp(sampling)
    longest = int(np.asarray(prompts.mask).sum(axis=1).max())
    if prompts.resume is not None or sampling.stop_after is not None:
        raise ValueError("a conversation is sampled to its end; legal: prompts.resume and sampling.stop_after of None")
    if max_turns < 1 or max_context <= longest:
        given = f"max_turns is {max_turns}, max_context {max_context}"
        raise ValueError(f"{given}; legal: at least 1 turn, and {longest + 1} tokens for the longest prompt")
    if cache not in ("kept", "prefill"):
        raise ValueError(f"cache is {cache!r}; legal: 'kept' and 'prefill'")
    if jax.process_count() > 1:
        raise ValueError(f"conversations are sampled by one process, and here are {jax.process_count()}")


def _fill_slots(slots: np.ndarray, waiting: list[int]) -> np.ndarray:
    """Put waiting conversations into the empty slots. Returns which slots were filled. bool [W]"""
    filled = np.flatnonzero(slots < 0)[: len(waiting)]
    slots[filled] = waiting[: len(filled)]
    del waiting[: len(filled)]
    return np.isin(np.arange(len(slots)), filled)


# -------------------------------------------------------------------------------------------------- the environment


def _take_turns(record: ConversationRecord, turn: TurnTokens, slots: np.ndarray, complete: np.ndarray) -> list[Turn]:
    """Append the complete turns to their conversations, and return them."""
    turn = jax.device_get(turn)
    turns = []
    for slot in np.flatnonzero(complete):
        sampled = slice(turn.count[slot])
        tokens = turn.tokens[slot, sampled]
        support = None if turn.support is None else turn.support[slot, sampled]
        record.append_turn(slots[slot], tokens, turn.logp[slot, sampled], support)
        turns.append(Turn(int(slots[slot]), tokens.tolist(), bool(turn.terminated[slot])))
    return turns


def _answer_turns(record: ConversationRecord, respond: RespondFn, turns: list[Turn], max_turns: int) -> list[int]:
    """Append the environment's observations. Returns the conversations that have ended."""
    pairs = zip(turns, respond(turns), strict=True)
    return [turn.row for turn, seen in pairs if record.append_observation(turn.row, seen, max_turns)]


def _checked(respond: RespondFn, vocabulary: int) -> RespondFn:
    """The same function, which raises ValueError, naming the row, for what is no answer to the turns."""

    def checked(turns: Sequence[Turn]) -> Sequence[Observation]:
        observations = respond(turns)
        if len(observations) != len(turns):
            raise ValueError(f"respond gave {len(observations)} observations for {len(turns)} turns; legal: one each")
        for turn, observation in zip(turns, observations, strict=True):
            if not isinstance(observation, Observation):
                raise ValueError(f"respond gave {type(observation).__name__} for row {turn.row}; legal: Observation")
            tokens = np.asarray(observation.tokens)
            is_list = tokens.ndim == 1 and (np.issubdtype(tokens.dtype, np.integer) or not tokens.size)
            if not is_list or (tokens < 0).any() or (tokens >= vocabulary).any():
                legal = f"legal: ids below {vocabulary}"
                raise ValueError(f"the observation for row {turn.row} has tokens that are no list of ids; {legal}")
        return observations

    return checked


# ------------------------------------------------------------------------------------------------- the compiled part


class _Engine(NamedTuple):
    """The compiled calls with what does not change between them."""

    lm: LM
    params: Params
    frozen: Params
    prompts: DevicePrompts
    sampling: Sampling
    seed: Array
    max_context: int

    @property
    def widest(self) -> int:
        """Tokens of the widest chunk. The caches have as many columns beyond the conversations, for its padding."""
        return min(max(power_of_two(self.max_context // 4), MIN_CHUNK), MAX_CHUNK)

    @property
    def prompt_columns(self) -> int:
        """Columns in which the prompts are read: of the data set's longest, so that one program serves them all."""
        return min(self.prompts.tokens.shape[1], self.max_context)

    def empty_state(self, rows: int) -> TurnState:
        """So many empty slots, with caches that have room for any prompt as it was read."""
        columns = min(max(INITIAL_COLUMNS, self.prompt_columns), self.max_context + self.widest)
        return turn_decoding.empty_slots(self.lm, self.params, self.frozen, self.sampling, rows, columns)

    def vocabulary(self, state: TurnState) -> int:
        """How many tokens there are."""
        return jax.eval_shape(self.lm.logits, self.params, self.frozen, state.hidden).shape[-1]

    def make_room(self, state: TurnState, record: ConversationRecord, slots: np.ndarray) -> TurnState:
        """The state with caches that have room for a turn of each conversation in the slots."""
        longest = record.length[slots[slots >= 0]].max() + self.sampling.max_tokens
        needed = min(longest, self.max_context) + self.widest
        columns = state.columns
        while columns < needed:
            columns = min(2 * columns, self.max_context + self.widest)
        return state if columns == state.columns else turn_decoding.grow_slots(self.lm, state, columns)

    def read_prompts(self, record: ConversationRecord) -> TurnState:
        """Each prompt once, in a row of its own."""
        length = record.length[:: self.sampling.n]
        tokens = record.tokens[:: self.sampling.n, : self.prompt_columns]
        state = turn_decoding.empty_slots(self.lm, self.params, self.frozen, self.sampling, *tokens.shape)
        return self._read(state, tokens, length, np.zeros_like(length))

    def read(
        self, state: TurnState, record: ConversationRecord, slots: np.ndarray, begins: np.ndarray, from_the_start: bool
    ) -> TurnState:
        """What the slots in which a turn begins have not read yet, or all of it, a chunk at a time."""
        start = np.where(begins & from_the_start, 0, np.asarray(state.length))
        end = np.where(begins, record.length[slots], start)
        while (left := end - start).any():
            width = min(power_of_two(int(left.max())), self.widest)
            count = np.minimum(left, width)
            columns = np.minimum(start[:, None] + np.arange(width), self.max_context - 1)
            tokens = record.tokens[slots[:, None], columns]
            state = self._read(state, tokens, count, start)
            start = start + count
        return state

    def _read(self, state: TurnState, tokens: np.ndarray, count: np.ndarray, start: np.ndarray) -> TurnState:
        count, start = count.astype(np.int32), start.astype(np.int32)
        return turn_decoding.read_tokens(self.lm, self.params, self.frozen, state, tokens, count, start)

    def decode(self, state: TurnState, record: ConversationRecord, slots: np.ndarray, begins: np.ndarray) -> TurnState:
        """Sample until half of the conversations in the slots have a complete turn."""
        row = np.maximum(slots, 0)
        requests = np.stack([row // self.sampling.n, row % self.sampling.n], axis=1).astype(np.int32)
        return turn_decoding.decode_turns(
            self.lm,
            self.params,
            self.frozen,
            state,
            self.prompts.replace(requests=requests),
            self.sampling,
            self.seed,
            record.sampled[row],
            begins,
            np.int32((slots >= 0).sum() // 2),
            self.max_context,
        )

    def keep_routing(self, state: TurnState, record: ConversationRecord, slots: np.ndarray, ended: np.ndarray) -> None:
        """Of mixture models: the experts of the conversations that have ended."""
        if self.lm.routing is None or not ended.any():
            return
        experts = np.asarray(self.lm.routing(state.cache))
        for slot in np.flatnonzero(ended):
            record.keep_routing(slots[slot], experts[slot])
