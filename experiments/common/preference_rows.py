"""Rows of dpo.py: what a method learns from, and the reference's log-probs of it, computed once a start."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.common import data, offline
from experiments.common.data import Examples
from experiments.common.preference_methods import Method
from experiments.common.settings import Data
from rljax.data.demonstrations import EMPTY, collate, collate_after_prompts
from rljax.data.examples import Comparison, Example, Judgment, comparison, gold, judgment
from rljax.data.preferences import collate_pairs, collate_unpaired, judgments_of, mismatched_examples
from rljax.data.tokenizer import Tokenizer
from rljax.models.policy import AnnotateFn
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.train.mesh import Shardings
from rljax.train.shared_prefix import make_shared_prefix_annotate
from rljax.types import Pairs, TrainState, Trajectory, Unpaired


class Row(NamedTuple):
    """A comparison or a judgment. `ref_logps` are the reference's log-probs of the decisions of its completions."""

    completions: tuple[
        Example, ...
    ]  # chosen, rejected and perhaps gold; or the one judged and perhaps a mismatched one
    label: float | bool | None  # the margin of a comparison; whether the completion judged is desirable
    ref_logps: tuple[np.ndarray, ...] = ()


# ------------------------------------------------------------------------------------------------------------- reading


def read_rows(settings: Data, method: Method, tokenizer: Tokenizer, context: int, seed: int) -> Examples:
    """The rows that a method learns from. For one that judges completions a pair is two judgments, as in TRL.

    Raises ValueError where the method needs what a row lacks: a margin, or a column `gold`.
    """
    readers = {"pairs": _pair, "rated pairs": _rated_pair, "pairs with gold": _pair_with_gold, "judgments": _judged}
    found = data.read_examples(settings, readers[method.rows], tokenizer, context, seed)
    sides = [[row for rows in side for row in rows] for side in found]
    if method.mismatched:
        prompt_tokens, max_tokens = offline.widths(row.completions[0] for side in sides for row in side)
        sides = [_with_mismatched(side, sides[0], prompt_tokens + max_tokens) for side in sides]
    return Examples(*sides)


def _pair(row: dict, tokenizer: Tokenizer) -> list[Row]:
    found = comparison(row, tokenizer)
    return [Row((found.chosen, found.rejected), found.margin)]


def _rated_pair(row: dict, tokenizer: Tokenizer) -> list[Row]:
    (found,) = _pair(row, tokenizer)
    if found.label is None:
        raise ValueError("a pair without a margin; this method wants one: by how much the chosen completion is better")
    return [found]


def _pair_with_gold(row: dict, tokenizer: Tokenizer) -> list[Row]:
    (found,) = _pair(row, tokenizer)
    if "gold" not in row:
        raise ValueError("a pair without a column gold; this method wants one: a third completion, to be imitated")
    return [found._replace(completions=(*found.completions, gold(row, tokenizer)))]


def _judged(row: dict, tokenizer: Tokenizer) -> list[Row]:
    judged = judgments_of(comparison(row, tokenizer)) if "chosen" in row else (judgment(row, tokenizer),)
    return [Row((one.example,), one.desirable) for one in judged]


def _with_mismatched(rows: list[Row], pool: list[Row], width: int) -> list[Row]:
    """The rows with a completion of the pool, that of another prompt."""
    examples, in_pool = ([row.completions[0] for row in side] for side in (rows, pool))
    others = mismatched_examples(examples, in_pool, width)
    return [row._replace(completions=(*row.completions, other)) for row, other in zip(rows, others, strict=True)]


# ------------------------------------------------------------------------------------------------------------- batches


def empty_row(like: Row) -> Row:
    """A row that teaches nothing, with as many completions as another."""
    nothing = tuple(np.zeros(0, np.float32) for _ in like.ref_logps)
    label = False if isinstance(like.label, bool) else None
    return Row((EMPTY,) * len(like.completions), label, nothing)


def collate_rows(rows: Sequence[Row], method: Method, prompt_tokens: int, max_tokens: int) -> Pairs | Unpaired:
    """The batch of a method."""
    if method.rows == "judgments":
        judgments = [Judgment(row.completions[0], row.label) for row in rows]
        others = [row.completions[1] for row in rows] if method.mismatched else None
        batch = collate_unpaired(judgments, prompt_tokens + max_tokens, others)
        parts = ("traj", "mismatched")
    else:
        comparisons = [Comparison(*row.completions[:2], row.label) for row in rows]
        batch = collate_pairs(comparisons, prompt_tokens, max_tokens, with_margin=method.rows == "rated pairs")
        if method.rows == "pairs with gold":
            golds = [row.completions[2] for row in rows]
            batch = batch.replace(gold=collate_after_prompts(golds, prompt_tokens, max_tokens))
        parts = ("chosen", "rejected")
    for number in range(len(rows[0].ref_logps)):
        traj = getattr(batch, parts[number])
        logps = [row.ref_logps[number] for row in rows]
        batch = batch.replace(**{parts[number]: _with_ref_logp(traj, logps)})
    return batch


def _with_ref_logp(traj: Trajectory, logps: Sequence[np.ndarray]) -> Trajectory:
    """The trajectory with the log-probs of each row's decisions in their columns."""
    values = np.zeros(traj.mask.shape, np.float32)
    values[np.asarray(traj.mask)] = np.concatenate(logps)
    return traj.replace(ref_logp=jnp.asarray(values))


# ----------------------------------------------------------------------------------------------------------- reference


def with_reference(
    rows: Examples,
    drawn: Sequence[int] | np.ndarray,
    annotate: AnnotateFn,
    state: TrainState,
    widths: tuple[int, int],
    size: int,
    shardings: Shardings,
) -> Examples:
    """The rows with the log-probs that the policy has before its first update: it is the reference then.

    Computed for the rows that a run reads, once a start, so that no copy of the reference is kept during training.

    Args:
      drawn: indices of the training rows that are learned from; the others stay without log-probs.
      annotate: fills `old_logp`.
      widths: tokens of the longest prompt and of the longest completion. size: rows at a time.
    """
    completions = len(rows.train[0].completions)
    is_pair = not isinstance(rows.train[0].label, bool)
    columns = widths[0] - 1 if is_pair else 0
    annotate = make_shared_prefix_annotate(annotate, columns, completions, size * completions, shardings)

    def logps_of(part: list[Row]) -> Iterator[np.ndarray]:
        examples = [example for row in part for example in row.completions]
        traj = collate_after_prompts(examples, *widths) if is_pair else collate(examples, sum(widths))
        logp = distributed.fetch(annotate(state, traj).old_logp)
        return iter([values[decides] for values, decides in zip(logp, np.asarray(traj.mask), strict=True)])

    numbers = np.unique(np.asarray(drawn)).tolist()
    read = [*(rows.train[i] for i in numbers), *rows.eval]
    found = []
    for part in offline.filled(read, size, empty_row(read[0])):
        logps = logps_of(part)
        before = 10 * len(found) // len(read)
        found += [row._replace(ref_logps=tuple(next(logps) for _ in range(completions))) for row in part]
        now = 10 * min(len(found), len(read)) // len(read)
        if now > before:
            log_info(f"reference log-probs: {10 * now} % of {len(read)} rows")
    train = list(rows.train)
    for i, row in zip(numbers, found, strict=False):
        train[i] = row
    return Examples(train, found[len(numbers) : len(read)])
