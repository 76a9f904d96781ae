"""Strings that end an answer, found wherever they stand: inside a token, or across tokens.

Aho & Corasick (1975), Efficient string matching. The automaton reads bytes; here it reads whole tokens.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

Text = TypeVar("Text", str, bytes)


def stop_strings(strings: Sequence[str | bytes], pieces: Sequence[bytes]) -> np.ndarray:
    """The automaton of `Sampling.stop_strings`, for a vocabulary whose V tokens stand for the bytes `pieces`.

    A state is the longest end of the text that begins a string, 0 the empty one. Entry [s, v] is the state after state
    s and the bytes of token v, or -1 where one of the strings ends among them: [states V] int32, with at most as many
    states as the strings have bytes. Raises ValueError for an empty string, or none.
    """
    legal = not isinstance(strings, str | bytes) and len(strings) and all(len(s) for s in strings)
    if not legal:
        raise ValueError(f"stop strings {strings!r}; legal: a list of one or more, each of at least one character")
    step = _automaton([s.encode() if isinstance(s, str) else s for s in strings])
    found = len(step)  # a state that is never left
    step = np.append(np.where(step < 0, found, step), np.full((1, 256), found), axis=0).astype(np.int32).ravel()

    lengths = np.array([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")  # the longest first: those with a k-th byte stand together
    starts, text = (np.cumsum(lengths) - lengths)[order], np.frombuffer(b"".join(pieces), np.uint8)
    state = np.repeat(np.arange(found, dtype=np.int32)[:, None], len(pieces), axis=1)
    for k in range(lengths.max()):
        longer = slice(int((lengths > k).sum()))
        state[:, longer] = step[256 * state[:, longer] + text[starts[longer] + k]]
    out = np.empty_like(state)
    out[:, order] = np.where(state == found, -1, state)
    return out


def _automaton(strings: list[bytes]) -> np.ndarray:
    """The state after reading a byte, -1 where a string ends. [states 256]"""
    beginnings = sorted({s[:i] for s in strings for i in range(len(s))}, key=lambda p: (len(p), p))
    states = [p for p in beginnings if not any(s in p for s in strings)]
    number = {p: i for i, p in enumerate(states)}
    step = np.zeros((len(states), 256), np.int32)
    for i, p in enumerate(states):
        if p:  # as the longest shorter end of p that begins a string, but where p itself goes on
            step[i] = step[next(number[p[k:]] for k in range(1, len(p) + 1) if p[k:] in number)]
        for longer in {s[: len(p) + 1] for s in strings if s.startswith(p)}:
            step[i, longer[-1]] = -1 if any(longer.endswith(s) for s in strings) else number[longer]
    return step


def cut(text: Text, strings: Sequence[Text]) -> Text:
    """The text before the stop string that ended it: the first to end, of several the longest."""
    met = [(place + len(s), place) for s in strings if (place := text.find(s)) >= 0]
    return text[: min(met)[1]] if met else text


def streamed_text(tokens: Iterable[int], pieces: Sequence[bytes], strings: Sequence[bytes], over: bool) -> str:
    """The text of an answer, without the stop string that ended it.

    Until it is over, without what may yet become a stop string or a character: what is there stays.
    """
    text = b"".join(pieces[token] for token in tokens)
    held = max(map(len, strings), default=1) - 1
    text = cut(text, strings) if over else text[: max(len(text) - held, 0)]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(text, final=over)
