"""The protocol of text environments: tools, games and dialogues that are played in turns, on the host.

    env = TextEnv("higher or lower", reset, step)
    state, observation = env.reset(row, seed)      # the prompt
    step = env.step(state, "50")                   # what the model wrote -> TextStep

What an environment does wrong never hangs a run and never becomes a reward of 0:

| an environment | what follows |
|---|---|
| returns something else than the protocol says, or a reward of NaN or infinity | TextEnvError, which names it: a bug |
| raises in `reset`, or gives no answer in time there | TextEnvError: there is no prompt |
| returns the reward None | status "unjudged": the conversation has no reward; it is counted |
| raises in `step` | status "raised": the conversation is truncated and has no reward; it is counted |
| gives no answer in time | status "timeout": likewise |
| writes an observation longer than the limit | the middle is cut out, and the text says how much |
| writes a long prompt | it stays whole: a prompt is bounded in tokens, by who encodes it |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.envs.deadline import call_each

TextOrMessages = str | list[dict[str, Any]]  # one message of the user, or messages {"role", "content"}
TurnStatus = Literal["ok", "unjudged", "raised", "timeout"]


class TextEnvError(Exception):
    """A text environment broke its protocol."""


class TextStep(NamedTuple):
    """What an environment answers to a turn of the model."""

    state: Any
    observation: TextOrMessages = ""  # what the model reads before its next turn; not read where the task is over
    reward: float | None = 0.0  # of this turn; None: it could not be judged
    terminated: bool = False  # the task is over
    truncated: bool = False  # it was cut, which is no end of the task; never together with `terminated`
    info: Mapping[str, float] = {}  # numbers to be logged: their sums over a conversation are averaged


class TextEnv(NamedTuple):
    """A text environment. A state is never shared: an environment may change it and return the same one."""

    name: str
    reset: Callable[[Mapping[str, Any], int], tuple[Any, TextOrMessages]]  # (row of the data, seed) -> state, prompt
    step: Callable[[Any, str], TextStep]  # (state, what the model wrote)
    tools: tuple[dict, ...] = ()  # schemas of functions, for the chat template


class TurnLimits(NamedTuple):
    """What an environment may take for a turn."""

    timeout_seconds: float = 10.0
    max_characters: int = 4000  # of a message of an observation; prompts are not cut
    workers: int = 16  # turns that are played side by side


class PlayedTurn(NamedTuple):
    """The outcome of one turn. Where the status is "raised" or "timeout", `step` is truncated, without a reward."""

    step: TextStep
    status: TurnStatus
    detail: str = ""
    cut_characters: int = 0
    special_tokens: int = 0  # that the observation spelled; they became plain text


def begin_each(
    env: TextEnv, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], limits: TurnLimits
) -> list[tuple[Any, list[dict]]]:
    """State and first messages of an episode for each row. Raises TextEnvError, naming environment and row."""
    calls = [lambda row=row, seed=seed: env.reset(row, seed) for row, seed in zip(rows, seeds, strict=True)]
    begun = []
    for row, called in zip(rows, _call_each(env, calls, limits), strict=True):
        place = f"reset of the environment {env.name}, row {_shown(row)}"
        if called.status != "ok":
            raise TextEnvError(f"{place}: {called.detail}")
        if not (isinstance(called.value, tuple) and len(called.value) == 2):
            raise TextEnvError(f"{place} returned {_shown(called.value)}; legal: (state, observation)")
        state, observation = called.value
        messages = _messages(observation, place)
        if not any(message["content"] for message in messages):
            raise TextEnvError(f"{place} returned no text to begin with; legal: a prompt")
        begun.append((state, messages))
    return begun


def play_each(env: TextEnv, states: Sequence[Any], texts: Sequence[str], limits: TurnLimits) -> list[PlayedTurn]:
    """Each text as a turn in its state, side by side; the observations are lists of messages.

    Raises TextEnvError, naming the environment, for what is not of the protocol, and where too many turns hang.
    """
    calls = [lambda state=state, text=text: env.step(state, text) for state, text in zip(states, texts, strict=True)]
    played = []
    for state, text, called in zip(states, texts, _call_each(env, calls, limits), strict=True):
        if called.status == "ok":
            place = f"step of the environment {env.name} after {_shown(text)}"
            played.append(check_turn(called.value, place, limits.max_characters))
        else:
            over = TextStep(state, [], None, truncated=True)
            played.append(PlayedTurn(over, called.status, called.detail))
    return played


def check_turn(returned: Any, place: str, max_characters: int) -> PlayedTurn:
    """What `step` returned, its observation as messages of at most so many characters each. Raises TextEnvError."""
    if not isinstance(returned, TextStep):
        raise TextEnvError(f"{place} returned {_shown(returned)}; legal: a TextStep")
    for name in ("terminated", "truncated"):
        if not isinstance(getattr(returned, name), bool | np.bool_):
            raise TextEnvError(f"{place}: {name} is {_shown(getattr(returned, name))}; legal: True or False")
    if returned.terminated and returned.truncated:
        raise TextEnvError(f"{place}: terminated and truncated; legal: one of them, a task that is over is not cut")
    if returned.reward is not None and not _is_finite(returned.reward):
        shown = _shown(returned.reward)
        raise TextEnvError(f"{place}: the reward is {shown}; legal: a finite number, or None for what cannot be judged")
    if not (isinstance(returned.info, Mapping) and all(map(_is_finite, returned.info.values()))):
        raise TextEnvError(f"{place}: info is {_shown(returned.info)}; legal: names with finite numbers")
    messages = _messages(returned.observation, place)
    cut = sum(max(len(message["content"]) - max_characters, 0) for message in messages)
    messages = [{**message, "content": cut_middle(message["content"], max_characters)} for message in messages]
    step = returned._replace(observation=messages)
    return PlayedTurn(step, "unjudged" if returned.reward is None else "ok", cut_characters=cut)


def cut_middle(text: str, most: int) -> str:
    """The text with its middle left out, of which a line says how much, where it has more than `most` characters.

    >>> cut_middle("abcdefgh", 4)
    'ab\\n[4 characters cut]\\ngh'
    """
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}\n[{len(text) - most:,} characters cut]\n{text[len(text) - (most - head) :]}"


def _call_each(env: TextEnv, calls: Sequence[Callable[[], Any]], limits: TurnLimits) -> list:
    try:
        return call_each(calls, limits.timeout_seconds, limits.workers, f"environment {env.name}")
    except RuntimeError as error:
        raise TextEnvError(str(error)) from None


def _messages(observation: Any, place: str) -> list[dict]:
    """The messages of an observation. A character that is no Unicode becomes "?"."""
    messages = observation
    if isinstance(observation, str):
        messages = [{"role": "user", "content": observation}] if observation else []
    if not isinstance(messages, list):
        raise TextEnvError(f"{place}: the observation is {_shown(observation)}; legal: a text, or a list of messages")
    found = []
    for message in messages:
        texts = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise TextEnvError(f"{place}: a message is {_shown(message)}; legal: {{'role': text, 'content': text}}")
        found.append({**message, "content": message["content"].encode("utf-8", "replace").decode("utf-8")})
    return found


def _is_finite(value: Any) -> bool:
    """Whether it is a number, of Python or numpy, that is finite."""
    is_number = isinstance(value, Real | np.bool_) or (isinstance(value, np.ndarray) and value.shape == ())
    try:
        return is_number and math.isfinite(value)
    except (OverflowError, TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= 80 else f"{text[:80]} ..."
