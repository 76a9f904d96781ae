"""Comparisons, judgments and rankings of completions, as batches of the DPO family, of KTO and of reward models."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rljax.data.demonstrations import EMPTY, collate, collate_after_prompts
from rljax.data.examples import Comparison, Example, Judgment
from rljax.types import Pairs, Trajectory, Unpaired


def collate_pairs(
    comparisons: Sequence[Comparison], prompt_tokens: int, max_tokens: int, with_margin: bool = False, pad: int = 0
) -> Pairs:
    """Pairs [B] whose completions all begin in the same column, so that the two of a pair can share their prompt.

    Args:
      prompt_tokens, max_tokens: widths of prompts and of completions; what is longer is a ValueError.
      with_margin: fill `Pairs.margin`; NaN where a comparison has none.
    """

    def rows(examples: list[Example]) -> Trajectory:
        return collate_after_prompts(examples, prompt_tokens, max_tokens, pad)

    margin = None
    if with_margin:
        margin = jnp.asarray([np.nan if c.margin is None else c.margin for c in comparisons], jnp.float32)
    return Pairs(rows([c.chosen for c in comparisons]), rows([c.rejected for c in comparisons]), margin)


def judgments_of(comparison: Comparison) -> tuple[Judgment, Judgment]:
    """The chosen completion as a desirable one, the rejected as an undesirable one (as TRL's KTO reads pairs)."""
    return Judgment(comparison.chosen, True), Judgment(comparison.rejected, False)


def collate_unpaired(
    judgments: Sequence[Judgment], width: int, mismatched: Sequence[Example] | None = None, pad: int = 0
) -> Unpaired:
    """Unpaired [B], a row of `width` tokens each; with the rows of KTO's z, as `mismatched` makes them."""
    desirable = jnp.asarray([judgment.desirable for judgment in judgments])
    traj = collate([judgment.example for judgment in judgments], width, pad)
    return Unpaired(traj, desirable, None if mismatched is None else collate(mismatched, width, pad))


def mismatched_examples(examples: Sequence[Example], pool: Sequence[Example], width: int) -> list[Example]:
    """Each prompt with the completion of one of the pool that has another prompt (KTO's z), taken in turn from the pool
    in a fixed random order: chosen and rejected ones are mixed as they are in the pool.

    What exceeds `width` tokens is cut off. Raises ValueError where the pool has no other prompt.
    """
    count = len(pool)
    order = np.random.default_rng([4, count]).permutation(count)
    found = []
    for row, example in enumerate(examples):
        in_turn = (pool[order[(row + k) % count]] for k in range(count))
        other = next((other for other in in_turn if other.prompt != example.prompt), None)
        if other is None:
            raise ValueError(f"{count} completions of one prompt; legal for KTO's reference point: two prompts or more")
        room = width - len(example.prompt)
        found.append(example._replace(completion=other.completion[:room], mask=other.mask[:room]))
    return found


def collate_rankings(
    rankings: Sequence[Sequence[Example]], most: int, prompt_tokens: int, max_tokens: int, pad: int = 0
) -> Trajectory:
    """A trajectory [P K T] of rankings, best completion first; rows that a prompt lacks have no decision.

    Args: most: K, the completions of the longest ranking.
    """
    rows = [example for found in rankings for example in [*found, *[EMPTY] * (most - len(found))]]
    traj = collate_after_prompts(rows, prompt_tokens, max_tokens, pad)
    return jax.tree.map(lambda x: x.reshape(len(rankings), most, *x.shape[1:]), traj)
