"""What has happened in B conversations so far, on the host: rows of tokens that only grow, and facts of the tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rljax.types import Observation, PromptBatch, Sampling, Trajectory, trajectory_of_tokens


class ConversationCounts(NamedTuple):
    """What became of each of B conversations, on the host."""

    turns: np.ndarray  # [B] turns that the policy wrote
    observed: np.ndarray  # [B] tokens that the environment added
    out_of_context: np.ndarray  # [B] bool: it was cut because its row is full
    out_of_turns: np.ndarray  # [B] bool: it was cut after max_turns


@dataclass(frozen=True)
class ConversationRecord:
    """B rows of S = max_context tokens. Its methods write into the arrays."""

    tokens: np.ndarray  # [B S]
    length: np.ndarray  # [B] tokens of the row
    sampled: np.ndarray  # [B] how many of them the policy chose
    facts: dict[str, np.ndarray]  # [B S] each, of chosen tokens: chosen, logp, rewards, step_ends, terminated ...
    counts: ConversationCounts
    routing: dict[str, np.ndarray]  # "experts" [B S M k] of mixture models, from the first conversation's end on

    def append_turn(self, row: int, tokens: np.ndarray, logp: np.ndarray, support: np.ndarray | None) -> None:
        """What the policy sampled in a turn."""
        start = self.length[row]
        columns = slice(start, start + len(tokens))
        self.tokens[row, columns] = tokens
        self.facts["chosen"][row, columns] = True
        self.facts["logp"][row, columns] = logp
        if support is not None:
            self.facts["support"][row, columns] = support
        self.facts["step_ends"][row, columns.stop - 1] = True
        self.length[row] = columns.stop
        self.sampled[row] += len(tokens)
        self.counts.turns[row] += 1

    def append_observation(self, row: int, observation: Observation, max_turns: int) -> bool:
        """What the environment answered to the last turn. Returns whether the conversation is over.

        Of one that is over no observation is kept: the policy never reads it.
        """
        end = self.length[row]
        added = len(observation.tokens)
        self.facts["rewards"][row, end - 1] = observation.reward
        self.facts["terminated"][row, end - 1] = observation.terminated
        if observation.terminated:
            return True
        out_of_turns = self.counts.turns[row] >= max_turns
        out_of_context = end + added >= self.tokens.shape[1]
        if observation.truncated or out_of_turns or out_of_context:
            self.counts.out_of_turns[row] = out_of_turns and not observation.truncated
            self.counts.out_of_context[row] = out_of_context and not (observation.truncated or out_of_turns)
            self.facts["truncated"][row, end - 1] = True
            return True
        self.tokens[row, end : end + added] = observation.tokens
        self.length[row] += added
        self.counts.observed[row] += added
        return False

    def keep_routing(self, row: int, experts: np.ndarray) -> None:
        """The experts [S M k] of all tokens of a conversation but the last, which no layer has read.

        S: columns of the cache, which is as long as it had to be: shorter than a row, or longer.
        """
        if not self.routing:
            self.routing["experts"] = np.zeros((*self.tokens.shape, *experts.shape[1:]), experts.dtype)
        columns = min(len(experts), self.tokens.shape[1])
        self.routing["experts"][row, :columns] = experts[:columns]

    def trajectory(self, group: np.ndarray, temperature: np.ndarray) -> Trajectory:
        """The conversations as rows of decisions; group, temperature: [B]."""
        segments = np.arange(self.tokens.shape[1]) < self.length[:, None]
        temperature = np.where(temperature == 0, 1.0, temperature).astype(np.float32)
        facts = self.facts | {"group": group, "temperature": np.broadcast_to(temperature[:, None], self.tokens.shape)}
        facts = {name: jnp.asarray(value) for name, value in facts.items()}
        traj = trajectory_of_tokens(self.tokens, segments.astype(np.int32), **facts)
        return traj.replace(routing=jnp.asarray(self.routing["experts"][:, :-1])) if self.routing else traj


def begin_record(prompts: PromptBatch, sampling: Sampling, max_context: int) -> ConversationRecord:
    """The prompts, sampling.n times each, from the first column on."""
    B = len(prompts.number) * sampling.n
    shape = (B, max_context)
    tokens = np.zeros(shape, np.int32)
    ids = [row[real] for row, real in zip(np.asarray(prompts.tokens), np.asarray(prompts.mask), strict=True)]
    for row in range(B):
        prompt = ids[row // sampling.n]
        tokens[row, : len(prompt)] = prompt
    facts = {name: np.zeros(shape, bool) for name in ("chosen", "step_ends", "terminated", "truncated")}
    facts |= {name: np.zeros(shape, np.float32) for name in ("logp", "rewards")}
    if sampling.support is not None:
        facts["support"] = np.full((*shape, sampling.support), -1, np.int32)
    return ConversationRecord(
        tokens=tokens,
        length=np.repeat([len(prompt) for prompt in ids], sampling.n),
        sampled=np.zeros(B, np.int32),
        facts=facts,
        counts=ConversationCounts(
            turns=np.zeros(B, np.int32),
            observed=np.zeros(B, np.int32),
            out_of_context=np.zeros(B, bool),
            out_of_turns=np.zeros(B, bool),
        ),
        routing={},
    )
