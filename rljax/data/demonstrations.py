"""Prompts followed by given completions, as trajectories for supervised fine-tuning."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rljax.data.prompts import pad_left
from rljax.types import PromptBatch, Trajectory, trajectory_of_tokens


def demonstrations(rows: PromptBatch, completions: Sequence[list[int]], max_tokens: int) -> Trajectory:
    """Each prompt followed by its completion (ids, EOS included), padded on the right to `max_tokens` of them.

    Raises ValueError for a completion that is longer.
    """
    longest = max(map(len, completions))
    if longest > max_tokens:
        raise ValueError(f"a completion has {longest} tokens; at most {max_tokens} fit")
    reversed_tokens, reversed_mask = pad_left([list(ids)[::-1] for ids in completions], max_tokens, 0)
    completion_tokens = reversed_tokens[:, ::-1]
    completion_mask = reversed_mask[:, ::-1]
    tokens = np.concatenate([rows.tokens, completion_tokens], axis=1)
    chosen = np.concatenate([np.zeros_like(rows.mask), completion_mask], axis=1)
    segments = np.concatenate([rows.mask, completion_mask], axis=1).astype(np.int32)
    return trajectory_of_tokens(
        tokens,
        segments,
        jnp.asarray(chosen),
        logp=jnp.zeros(tokens.shape),
        temperature=jnp.ones(tokens.shape),
        group=jnp.arange(len(completions)),
    )
