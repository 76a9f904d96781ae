"""A dataset of prompts with their columns, in an order that is a pure function of (seed, cursor)."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from rljax.ops.shapes import power_of_two
from rljax.ops.templates import fill, names_in
from rljax.types import PromptBatch


def from_template(template: str) -> Callable[[dict], str]:
    """columns of a row -> text, by a template with column names in braces: "{question}\n"; {{ and }} write a brace.

    Raises ValueError where the template does not parse. The function raises it, naming the columns, where the template
    does not fit them, and for a column that is null or holds neither text nor a finite number.
    """
    what = f"the template {template!r}"
    names_in(template, what)
    return lambda row: fill(template, row, what)


def train_eval_split(keys: Sequence[Hashable], eval_size: int, seed: int) -> tuple[list[int], list[int]]:
    """A random split of rows into (training, evaluation), as indices: `eval_size` for evaluation, at most half of all.

    Rows of equal keys are on one side. Where all have one key they are on both.
    """
    if eval_size < 1:
        raise ValueError(f"{eval_size} prompts to hold out; at least 1 is needed to evaluate on")
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    if len(groups) == 1:
        return list(range(len(keys))), list(range(len(keys)))
    members = list(groups.values())
    order = [members[i] for i in np.random.default_rng([2, seed]).permutation(len(members))]
    room = min(eval_size, len(keys) // 2)
    evaluation: list[int] = []
    for group in order:
        if len(evaluation) + len(group) <= room:
            evaluation += group
    evaluation = evaluation or min(order, key=len)  # every group is larger than asked for
    chosen = set(evaluation)
    return [i for group in order for i in group if i not in chosen], evaluation


def shuffled_indices(size: int, seed: int, start: int, count: int) -> np.ndarray:
    """Dataset indices of draws start .. start + count - 1: in each epoch another permutation, made from the seed."""
    return _indices_of_draws(size, seed, np.arange(start, start + count))


def _indices_of_draws(size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Dataset indices of the draws with these numbers."""
    indices = np.empty(len(numbers), np.int64)
    epochs = numbers // size
    for epoch in np.unique(epochs):
        order = np.random.default_rng([0, seed, int(epoch)]).permutation(size)
        in_epoch = epochs == epoch
        indices[in_epoch] = order[numbers[in_epoch] % size]
    return indices


def pad_left(rows: list[list[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [P L] that end in the last column, and the mask that is False on padding."""
    tokens = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, ids in enumerate(rows):
        tokens[i, length - len(ids) :] = ids
        mask[i, length - len(ids) :] = True
    return tokens, mask


def padded_width(longest: int) -> int:
    """The width of a batch whose longest row has so many tokens: a power of two, at least 16.

    Each new width is compiled, so there should be few.
    """
    return max(16, power_of_two(longest))


class Prompts:
    """A dataset of prompts. `draw(cursor, count)` is a pure function: resuming needs the cursor alone."""

    def __init__(
        self,
        columns: Sequence[dict],
        encoded: Sequence[list[int]],
        max_tokens: int,
        seed: int = 0,
        pad: int = 0,
        shaped: Sequence[dict] | None = None,
        completions: Sequence[list[int]] | None = None,
    ):
        """Rows with the ids of their prompts; those of more than `max_tokens` are dropped (their number: `dropped`).

        Args:
          columns: of the dataset, which verifiers read. shaped: the rows that the prompts were made of, where these
            differ from the columns. completions: the ids of the dataset's own completions, where it has some.
        Raises ValueError for an empty dataset, for an empty prompt, and where every prompt is too long.
        """
        if not columns:
            raise ValueError("the dataset is empty: at least one prompt is needed")
        if any(not ids for ids in encoded):
            raise ValueError(f"prompt {[bool(ids) for ids in encoded].index(False)} of the dataset has no tokens")
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_tokens]
        if not kept:
            shortest = min(map(len, encoded))
            raise ValueError(f"every prompt is longer than {max_tokens} tokens; the shortest has {shortest}")
        self.columns = [columns[i] for i in kept]
        self.encoded = [encoded[i] for i in kept]
        self.shaped = self.columns if shaped is None else [shaped[i] for i in kept]
        self.completions = None if completions is None else [completions[i] for i in kept]
        self.dropped = len(encoded) - len(kept)
        self.length = max(map(len, self.encoded))  # L: one width for every draw, so nothing recompiles
        self.seed = seed
        self.pad = pad

    def __len__(self) -> int:
        return len(self.columns)

    def _batch(
        self, indices: Sequence[int], numbers: Sequence[int], cursor: int, length: int | None = None
    ) -> PromptBatch:
        tokens, mask = pad_left([self.encoded[i] for i in indices], length or self.length, self.pad)
        columns = [self.columns[i] for i in indices]
        shaped = [self.shaped[i] for i in indices]
        return PromptBatch(tokens, mask, np.asarray(numbers, np.int32), columns, cursor, shaped=shaped)

    def draw(self, cursor: int, count: int) -> PromptBatch:
        """The next `count` prompts of the shuffled order from draw number `cursor` on."""
        cursor = int(cursor)
        indices = shuffled_indices(len(self), self.seed, cursor, count)
        return self._batch(indices, range(cursor, cursor + count), cursor + count)

    def indices_of(self, numbers: np.ndarray) -> np.ndarray:
        """Which prompts of the dataset have these draw numbers."""
        return _indices_of_draws(len(self), self.seed, np.asarray(numbers))

    def draw_unless(
        self, cursor: int, count: int, is_left_out: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> PromptBatch:
        """The next `count` prompts from draw number `cursor` on that are not left out.

        Where one epoch and `count` more draws hold too few, the first that were left out fill the batch.

        Args: is_left_out: (indices in the dataset, their epochs) -> bool, of many draws at a time.
        """
        first = int(cursor)
        numbers = np.arange(first, first + len(self) + count)
        left_out = is_left_out(self.indices_of(numbers), numbers // len(self))
        kept = numbers[~left_out][:count]
        chosen = np.sort(np.concatenate([kept, numbers[left_out][: count - len(kept)]]))
        return self._batch(self.indices_of(chosen), chosen, int(chosen[-1]) + 1)

    def columns_of(self, numbers: np.ndarray) -> list[dict]:
        """The columns of the prompts with these draw numbers."""
        return [self.columns[i] for i in self.indices_of(numbers)]

    def shaped_of(self, numbers: np.ndarray) -> list[dict]:
        """The rows that the prompts with these draw numbers were made of."""
        return [self.shaped[i] for i in self.indices_of(numbers)]

    def first(self, count: int) -> PromptBatch:
        """The first `count` prompts in the dataset's own order: a fixed set for evaluation."""
        count = min(count, len(self))
        return self._batch(range(count), range(count), count)

    def batches(self, count: int) -> Iterator[PromptBatch]:
        """Every prompt once, `count` at a time, the shortest first; `number` is its index in the dataset.

        The width of a batch is a `padded_width`.
        """
        order = sorted(range(len(self)), key=lambda i: len(self.encoded[i]))
        for start in range(0, len(order), count):
            indices = order[start : start + count]
            yield self._batch(indices, indices, len(self), padded_width(len(self.encoded[indices[-1]])))
