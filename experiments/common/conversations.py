"""A text environment and a tokenizer as what `sample_conversations` asks: how turns become text, and answers ids."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from rljax.data.chat import encode_prompt, encode_reply, ignores_tools, takes_role
from rljax.data.prompts import Prompts
from rljax.data.tokenizer import Tokenizer
from rljax.envs.text import PlayedTurn, TextEnv, TextEnvError, TurnLimits, begin_each, play_each
from rljax.ops.returns import episode_rewards
from rljax.rollouts.conversation_record import ConversationCounts
from rljax.rollouts.conversations import sample_conversations
from rljax.train.log import log_info
from rljax.types import LM, Observation, PromptBatch, RespondFn, Sampling, TrainState, Trajectory, Turn

SEED = "environment_seed"  # the column of a prompt that holds the seed of its episodes
REWARD_NAMES = ("environment",)  # of the rewards in logs
FAILED = ("raised", "timeout", "unjudged")  # statuses of a turn that leaves its conversation without a reward


# ------------------------------------------------------------------------------------------------------------- as ids


class TurnCodec(NamedTuple):
    """How a conversation becomes ids, turn by turn; what was sampled is never encoded again."""

    encode_prompt: Callable[[Sequence[dict]], list[int]]  # the first messages, with the generation prompt
    encode_reply: Callable[[Sequence[dict], Turn, Sequence[dict]], list[int]]  # (messages before the turn, turn, reply)
    decode_turn: Callable[[Turn], str]  # without its stop token
    special_tokens: tuple[str, ...]  # that an observation may not spell: see `spell_out`


def make_codec(tokenizer: Tokenizer, tools: Sequence[dict] = ()) -> TurnCodec:
    """Messages in the chat template of the tokenizer; where it has none, their texts one after another."""

    def decode_turn(turn: Turn) -> str:
        return tokenizer.decode_all(turn.tokens[:-1] if _has_ended(turn, tokenizer) else turn.tokens)

    if tokenizer.chat is not None:
        encode = _chat_encoders(tokenizer, list(tools) or None)
        return TurnCodec(*encode, decode_turn, tokenizer.special_tokens)
    if tools:
        log_info("warning: the tokenizer has no chat template: the model is not told what the tools are", "yellow")

    def encode_texts(messages: Sequence[dict]) -> list[int]:
        return tokenizer.encode("".join(message["content"] for message in messages))

    def encode_more(messages: Sequence[dict], turn: Turn, reply: Sequence[dict]) -> list[int]:
        return tokenizer.encode_more("".join(message["content"] for message in reply))

    return TurnCodec(encode_texts, encode_more, decode_turn, tokenizer.special_tokens)


def spell_out(text: str, special_tokens: Sequence[str]) -> tuple[str, int]:
    """The text with a space after the first character of each special token in it, and how many there were.

    A tokenizer makes "<|im_end|>" the token that ends a turn wherever a text has it. Spelled out it is plain text, so
    what a tool returns cannot end its own turn and begin one of another role. Others that the chat template writes,
    "</tool_response>" say, are treated alike (`Tokenizer.special_tokens`).

    >>> spell_out("4<|im_end|>", ["<|im_end|>"])
    ('4< |im_end|>', 1)
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)
    if not longest_first:
        return text, 0
    return re.subn("|".join(map(re.escape, longest_first)), lambda found: f"{found[0][0]} {found[0][1:]}", text)


def _has_ended(turn: Turn, tokenizer: Tokenizer) -> bool:
    """Whether the turn ended with a stop token: not at a stop string or at a limit."""
    return bool(turn.tokens) and turn.tokens[-1] in tokenizer.stop


def _chat_encoders(tokenizer: Tokenizer, tools: list[dict] | None) -> tuple[Callable, Callable]:
    chat = tokenizer.chat
    if tools and ignores_tools(chat):
        log_info(
            f"warning: the chat template of {chat.name} ignores tools: the model is not told what they are", "yellow"
        )
    has_tool_role = takes_role(chat, "tool")
    if not has_tool_role:
        log_info(f"the chat template of {chat.name} writes no messages of tools: they come as the user's")

    def encode_more(messages: Sequence[dict], turn: Turn, reply: Sequence[dict]) -> list[int]:
        if not has_tool_role:
            messages, reply = _from_user(messages), _from_user(reply)
        return encode_reply(chat, messages, _has_ended(turn, tokenizer), reply, tools)

    return lambda messages: encode_prompt(chat, messages, tools), encode_more


def _from_user(messages: Sequence[dict]) -> list[dict]:
    """Messages of tools as the user's. Neighbors become one: templates want user and assistant to alternate."""
    found: list[dict] = []
    for message in messages:
        role = "user" if message["role"] == "tool" else message["role"]
        if found and role == found[-1]["role"] == "user":
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n{message['content']}"}
        else:
            found.append({"role": role, "content": message["content"]})
    return found


# ------------------------------------------------------------------------------------------------------------- prompts


def environment_prompts(
    env: TextEnv, rows: Sequence[Mapping[str, Any]], codec: TurnCodec, max_tokens: int, seed: int, limits: TurnLimits
) -> Prompts:
    """The beginnings of an episode for each row; those of more than `max_tokens` tokens are dropped.

    An episode's seed is the row's own, in the column SEED, or its place among the rows beyond `seed`.
    """
    columns = [{SEED: seed + i, **row} for i, row in enumerate(rows)]
    begun = begin_each(env, columns, [row[SEED] for row in columns], limits)
    return Prompts(columns, [codec.encode_prompt(messages) for _, messages in begun], max_tokens, seed)


# ------------------------------------------------------------------------------------------------------- conversations


@dataclasses.dataclass
class Conversation:
    """One of the conversations that are being sampled; it grows turn by turn."""

    state: Any  # of the environment
    messages: list[dict]
    played: list[PlayedTurn]


class Conversations(NamedTuple):
    """The conversations of a rollout, and the function that answers their turns."""

    respond: RespondFn
    conversations: list[Conversation]  # row by row, as in the trajectory


def begin_conversations(
    env: TextEnv, prompts: PromptBatch, n: int, codec: TurnCodec, limits: TurnLimits
) -> Conversations:
    """n episodes for each prompt of a batch. Raises TextEnvError where they do not begin as the prompt does."""
    columns = [row for row in prompts.columns for _ in range(n)]
    begun = begin_each(env, columns, [row[SEED] for row in columns], limits)
    for i, number in enumerate(prompts.number):
        ids = np.asarray(prompts.tokens[i])[np.asarray(prompts.mask[i])].tolist()
        messages = [found for _, found in begun[i * n : (i + 1) * n]]
        if any(found != messages[0] for found in messages) or codec.encode_prompt(messages[0]) != ids:
            raise TextEnvError(
                f"reset of the environment {env.name} gave another prompt than before for the same row and seed "
                f"(prompt {number}); legal: a pure function of both"
            )
    conversations = [Conversation(state, list(messages), []) for state, messages in begun]

    def respond(turns: Sequence[Turn]) -> list[Observation]:
        chosen = [conversations[turn.row] for turn in turns]
        texts = [codec.decode_turn(turn) for turn in turns]
        played = play_each(env, [found.state for found in chosen], texts, limits)
        played = [_spelled_out(one, codec.special_tokens) for one in played]
        return [_answer(*answer, codec) for answer in zip(turns, texts, chosen, played, strict=True)]

    return Conversations(respond, conversations)


def _spelled_out(played: PlayedTurn, special_tokens: Sequence[str]) -> PlayedTurn:
    messages = []
    total = 0
    for message in played.step.observation:
        message = dict(message)
        for key in {"content", "name"} & message.keys():  # the name may be one that the model made up
            message[key], count = spell_out(str(message[key]), special_tokens)
            total += count
        messages.append(message)
    return played._replace(step=played.step._replace(observation=messages), special_tokens=total)


def _answer(turn: Turn, text: str, conversation: Conversation, played: PlayedTurn, codec: TurnCodec) -> Observation:
    """The observation as ids; the conversation is one turn longer then."""
    step = played.step
    before = list(conversation.messages)
    conversation.state = step.state
    conversation.messages += [{"role": "assistant", "content": text}, *step.observation]
    conversation.played.append(played)
    reward = float("nan") if step.reward is None else float(step.reward)
    is_over = bool(step.terminated or step.truncated)
    tokens = [] if is_over else codec.encode_reply(before, turn, step.observation)
    return Observation(tokens, reward, bool(step.terminated), bool(step.truncated))


class ConversationSettings(NamedTuple):
    """How conversations with an environment are sampled."""

    env: TextEnv
    codec: TurnCodec
    limits: TurnLimits
    sampling: Sampling  # max_tokens are those of a turn
    seed: int
    max_turns: int
    max_context: int  # tokens of a row: prompt, turns and observations
    shuffle_observations: bool = False  # a control: see `shuffle_answers`
    max_failed: float = 0.5  # share of conversations that the environment may leave without a reward
    cache: Literal["kept", "prefill"] = "kept"


class ConversationRollout(NamedTuple):
    """Sampled conversations: their tokens with the environment's rewards and scores, and what was said."""

    traj: Trajectory
    conversations: list[Conversation]
    metrics: dict[str, float]


def make_converse(lm: LM, settings: ConversationSettings) -> Callable[..., ConversationRollout]:
    """converse(state, prompts, step) -> sampling.n conversations for each prompt, scored by the environment.

    Raises TextEnvError where the environment breaks its protocol, or fails in too many of them.
    """
    env, n = settings.env, settings.sampling.n

    def converse(state: TrainState, prompts: PromptBatch, step: int) -> ConversationRollout:
        respond, conversations = begin_conversations(env, prompts, n, settings.codec, settings.limits)
        if settings.shuffle_observations:
            respond = shuffle_answers(respond, n, [settings.seed, step + 1])
        traj, counts = sample_conversations(
            lm,
            state.params,
            state.frozen,
            prompts,
            respond,
            settings.sampling,
            settings.seed,
            step,
            max_turns=settings.max_turns,
            max_context=settings.max_context,
            cache=settings.cache,
        )
        check_failed(env, conversations, settings.max_failed)
        return ConversationRollout(score_environment(traj), conversations, conversation_metrics(conversations, counts))

    return converse


def shuffle_answers(respond: RespondFn, n: int, seed: Sequence[int]) -> RespondFn:
    """A control: each conversation reads what a conversation on another prompt was answered. Rewards and ends stay.

    n: conversations of a prompt, which are neighbors.
    """
    random = np.random.default_rng(seed)
    given: list[tuple[int, list[int]]] = []  # prompt, answer

    def respond_to_others(turns: Sequence[Turn]) -> list[Observation]:
        answers = list(respond(turns))
        going_on = [i for i, answer in enumerate(answers) if answer.tokens]
        given.extend((turns[i].row // n, answers[i].tokens) for i in going_on)
        for i in going_on:
            others = [tokens for prompt, tokens in given if prompt != turns[i].row // n]
            if others:  # else all conversations are on one prompt
                answers[i] = answers[i]._replace(tokens=others[random.integers(len(others))])
        return answers

    return respond_to_others


# --------------------------------------------------------------------------------------------- scores, metrics, report


def score_environment(traj: Trajectory) -> Trajectory:
    """The trajectory with the sum of a conversation's rewards as its only score; NaN where a turn was not judged."""
    total, valid = episode_rewards(jnp.asarray(traj.rewards), traj.mask)
    scores = jnp.where(valid, total, jnp.nan)[:, None]
    return traj.replace(scores=scores, reward_weights=jnp.ones_like(scores))


def conversation_metrics(conversations: Sequence[Conversation], counts: ConversationCounts) -> dict[str, float]:
    """Means over conversations: turns and observed tokens, what was cut and what failed, what the environment logs.

    Raises TextEnvError for an environment that logs a number under one of our names.
    """
    totals: Counter = Counter({f"frac_{status}": 0 for status in FAILED})
    logged: Counter = Counter()
    for played in (played for conversation in conversations for played in conversation.played):
        totals["cut_characters"] += played.cut_characters
        totals["special_tokens"] += played.special_tokens
        logged.update({name: float(value) for name, value in played.step.info.items()})
    totals.update(f"frac_{found.status}" for found in map(first_failed, conversations) if found)
    totals["turns"] = counts.turns.sum()
    totals["observed_tokens"] = counts.observed.sum()
    totals["frac_out_of_context"] = counts.out_of_context.sum()
    totals["frac_out_of_turns"] = counts.out_of_turns.sum()
    taken = sorted(set(logged) & set(totals))
    if taken:
        raise TextEnvError(
            f"info of the environment has {taken[0]!r}; legal: names other than {', '.join(sorted(totals))}"
        )
    totals.update(logged)
    return {f"conversation/{name}": float(value) / len(conversations) for name, value in totals.items()}


def first_failed(conversation: Conversation) -> PlayedTurn | None:
    """The first turn that leaves the conversation without a reward, if there is one."""
    return next((played for played in conversation.played if played.status in FAILED), None)


def check_failed(env: TextEnv, conversations: Sequence[Conversation], max_failed: float) -> None:
    """Say what became of conversations that the environment left without a reward.

    Raises TextEnvError where their share is above `max_failed`.
    """
    failed = list(filter(None, map(first_failed, conversations)))
    if not failed:
        return
    counts = ", ".join(f"{status} {count}" for status, count in Counter(one.status for one in failed).items())
    line = f"environment {env.name} left {len(failed)} of {len(conversations)} conversations without a reward: {counts}"
    details = [one.detail for one in failed if one.detail]
    line += f"; the first: {details[0]}" if details else ""
    if len(failed) > max_failed * len(conversations):
        raise TextEnvError(f"{line}. Legal: at most {max_failed:.0%} of a rollout (--max_failed)")
    log_info(line, "yellow")


def turn_notes(conversations: Sequence[Conversation]) -> list[list[str]]:
    """What the report says of each turn of each conversation: what the environment logged, and what went wrong."""
    return [[", ".join(_notes(played)) for played in found.played] for found in conversations]


def _notes(played: PlayedTurn) -> list[str]:
    notes = [f"{name.replace('_', ' ')} {value:g}" for name, value in played.step.info.items() if value]
    if played.status != "ok":
        notes.append(f"{played.status}: {played.detail}" if played.detail else played.status)
    if played.cut_characters:
        notes.append(f"{played.cut_characters:,} characters cut")
    if played.special_tokens:
        notes.append(f"{played.special_tokens:,} special tokens spelled out")
    return notes
