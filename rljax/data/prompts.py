"""Prompts: a list of texts with their columns, and an order that is a pure function of (seed, cursor)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rljax.types import Rows


def read_jsonl(path: str | Path) -> list[dict]:
    """One dict a line. Raises FileNotFoundError, or ValueError naming the file and line."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: a {type(row).__name__}; each line must be an object")
                rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: a dataset needs at least one row")
    return rows


def from_template(template: str) -> Callable[[dict], str]:
    """columns of a row -> prompt, by a template with column names in braces: "{question}\n".

    The function raises ValueError, naming the columns, where the template does not fit them.
    """

    def text(row: dict) -> str:
        try:
            return template.format_map(row)
        except (KeyError, IndexError, AttributeError, ValueError) as missing:
            raise ValueError(
                f"the template {template!r} does not fit ({missing}); legal in braces: {', '.join(sorted(row))}"
            ) from None

    return text


def train_eval_split(columns: list[dict], count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """A random split into (training, held-out): `count` rows held out, at most half; of a single row, both sides."""
    if count < 1:
        raise ValueError(f"{count} prompts to hold out; at least 1 is needed to evaluate on")
    order = np.random.default_rng([2, seed]).permutation(len(columns))
    cut = min(count, len(columns) // 2)
    return [columns[i] for i in order[cut:]], [columns[i] for i in order[: cut or None]]


def draw_order(size: int, seed: int, start: int, count: int) -> np.ndarray:
    """Dataset indices of draws start .. start + count - 1: each epoch a permutation of its own, made from the seed."""
    return _drawn(size, seed, np.arange(start, start + count))


def _drawn(size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Dataset indices of the draws of these numbers."""
    out = np.empty(len(numbers), np.int64)
    for epoch in np.unique(numbers // size):
        order = np.random.default_rng([0, seed, int(epoch)]).permutation(size)
        here = numbers // size == epoch
        out[here] = order[numbers[here] % size]
    return out


def pad_left(rows: list[list[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [P L] that end in the last column, and the mask of real ones."""
    tokens = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, ids in enumerate(rows):
        tokens[i, length - len(ids) :] = ids
        mask[i, length - len(ids) :] = True
    return tokens, mask


class Prompts:
    """A dataset of prompts. `draw(cursor, count)` is a pure function: resuming needs the cursor alone."""

    def __init__(
        self,
        columns: list[dict],
        encode: Callable[[str], list[int]],
        text: Callable[[dict], str],
        max_tokens: int,
        seed: int = 0,
        pad: int = 0,
    ):
        """Encode every prompt once, and drop those longer than `max_tokens` (their number is `dropped`).

        text: columns of a row -> the prompt. Raises ValueError for an empty dataset, for an empty prompt, and where
        every prompt is too long.
        """
        if not columns:
            raise ValueError("the dataset is empty: at least one prompt is needed")
        encoded = [encode(text(row)) for row in columns]
        if any(not ids for ids in encoded):
            raise ValueError(f"prompt {[bool(ids) for ids in encoded].index(False)} of the dataset has no tokens")
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_tokens]
        if not kept:
            shortest = min(map(len, encoded))
            raise ValueError(f"every prompt is longer than {max_tokens} tokens; the shortest has {shortest}")
        self.columns = [columns[i] for i in kept]
        self.encoded = [encoded[i] for i in kept]
        self.dropped = len(encoded) - len(kept)
        self.length = max(map(len, self.encoded))  # L: one width for every draw, so nothing recompiles
        self.seed, self.pad = seed, pad

    def __len__(self) -> int:
        return len(self.columns)

    def _rows(self, indices, numbers, cursor: int, length: int | None = None) -> Rows:
        tokens, mask = pad_left([self.encoded[i] for i in indices], length or self.length, self.pad)
        return Rows(tokens, mask, np.asarray(numbers, np.int32), [self.columns[i] for i in indices], cursor)

    def draw(self, cursor: int, count: int) -> Rows:
        """The next `count` prompts of the shuffled order from draw number `cursor` on."""
        cursor = int(cursor)
        order = draw_order(len(self), self.seed, cursor, count)
        return self._rows(order, range(cursor, cursor + count), cursor + count)

    def columns_of(self, numbers: np.ndarray) -> list[dict]:
        """The columns of the prompts with these numbers in the shuffled order."""
        return [self.columns[i] for i in _drawn(len(self), self.seed, np.asarray(numbers))]

    def first(self, count: int) -> Rows:
        """The first `count` prompts in the dataset's own order: a fixed set to evaluate on."""
        count = min(count, len(self))
        return self._rows(range(count), range(count), count)

    def batches(self, count: int) -> Iterator[Rows]:
        """Every prompt once, `count` at a time, the shortest first; `number` is its place in the dataset.

        The width of a batch is a power of two, at least 16, so that there are few: each is compiled apart.
        """
        order = sorted(range(len(self)), key=lambda i: len(self.encoded[i]))
        for start in range(0, len(order), count):
            some = order[start : start + count]
            longest = len(self.encoded[some[-1]])
            yield self._rows(some, some, len(self), max(16, 1 << (longest - 1).bit_length()))
