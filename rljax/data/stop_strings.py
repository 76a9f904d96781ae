"""Strings that end a completion, found wherever they occur: inside a token or across tokens.

Aho & Corasick (1975), Efficient string matching. The automaton reads bytes; here it reads whole tokens.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

Text = TypeVar("Text", str, bytes)


def stop_strings(strings: Sequence[str | bytes], token_bytes: Sequence[bytes]) -> np.ndarray:
    """The automaton of `Sampling.stop_strings`, for a vocabulary of V tokens with these bytes.

    A state is the longest suffix of the text that is a proper prefix of a string, 0 the empty one. Entry [s, v] is the
    state after state s and the bytes of token v, or -1 where one of the strings ends among them: [states V] int32, with
    at most as many states as the strings have bytes. Raises ValueError for an empty string, or none.
    """
    legal = not isinstance(strings, str | bytes) and len(strings) and all(len(s) for s in strings)
    if not legal:
        raise ValueError(f"stop strings {strings!r}; legal: a list of one or more, each of at least one character")
    by_byte = _byte_automaton([s.encode() if isinstance(s, str) else s for s in strings])
    stopped = len(by_byte)  # one more state, which is never left
    by_byte = np.append(np.where(by_byte < 0, stopped, by_byte), np.full((1, 256), stopped), axis=0)
    by_byte = by_byte.astype(np.int32).ravel()

    lengths = np.array([len(token) for token in token_bytes])
    order = np.argsort(-lengths, kind="stable")  # the longest first: the tokens with a k-th byte are adjacent
    starts = (np.cumsum(lengths) - lengths)[order]
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    state = np.repeat(np.arange(stopped, dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for k in range(lengths.max()):
        longer = slice(int((lengths > k).sum()))
        state[:, longer] = by_byte[256 * state[:, longer] + text[starts[longer] + k]]
    by_token = np.empty_like(state)
    by_token[:, order] = np.where(state == stopped, -1, state)
    return by_token


def _byte_automaton(strings: list[bytes]) -> np.ndarray:
    """[states 256] the state after reading a byte, -1 where a string ends."""
    prefixes = sorted({s[:i] for s in strings for i in range(len(s))}, key=lambda prefix: (len(prefix), prefix))
    states = [prefix for prefix in prefixes if not any(s in prefix for s in strings)]
    number = {prefix: i for i, prefix in enumerate(states)}
    step = np.zeros((len(states), 256), np.int32)
    for i, prefix in enumerate(states):
        if prefix:  # where the prefix itself does not go on: as its longest proper suffix that is a state
            suffixes = [prefix[k:] for k in range(1, len(prefix) + 1)]
            longest = next(suffix for suffix in suffixes if suffix in number)
            step[i] = step[number[longest]]
        for longer in {s[: len(prefix) + 1] for s in strings if s.startswith(prefix)}:
            ends = any(longer.endswith(s) for s in strings)
            step[i, longer[-1]] = -1 if ends else number[longer]
    return step


def truncate_at_stop_string(text: Text, strings: Sequence[Text]) -> Text:
    """The text before the stop string that ended it: the first to end; of several that end there, the longest."""
    found = []
    for s in strings:
        start = text.find(s)
        if start >= 0:
            found.append((start + len(s), start))
    if not found:
        return text
    _, start = min(found)
    return text[:start]


def streamed_text(tokens: Iterable[int], token_bytes: Sequence[bytes], strings: Sequence[bytes], done: bool) -> str:
    """The text of a completion, without the stop string that ended it.

    Until it is done, what may still become a stop string or a character is withheld, so that text once shown stays.
    """
    text = b"".join(token_bytes[token] for token in tokens)
    if done:
        text = truncate_at_stop_string(text, strings)
    else:
        withheld = max(map(len, strings), default=1) - 1
        text = text[: max(len(text) - withheld, 0)]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(text, final=done)
