"""Prompts with their right answers, as trajectories to imitate."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rljax.data.prompts import pad_left
from rljax.types import Rows, Trajectory, trajectory_of_tokens


def demonstrations(rows: Rows, answers: Sequence[list[int]], length: int) -> Trajectory:
    """Each prompt followed by its answer (ids, EOS included), padded on the right to `length` answer tokens.

    Raises ValueError for an answer that is longer.
    """
    longest = max(map(len, answers))
    if longest > length:
        raise ValueError(f"an answer has {longest} tokens; at most {length} fit")
    backwards, real = pad_left([list(ids)[::-1] for ids in answers], length, 0)
    tokens = np.concatenate([rows.tokens, backwards[:, ::-1]], axis=1)
    chosen = np.concatenate([np.zeros_like(rows.mask), real[:, ::-1]], axis=1)
    segments = np.concatenate([rows.mask, real[:, ::-1]], axis=1).astype(np.int32)
    logp = jnp.zeros(tokens.shape)
    return trajectory_of_tokens(
        tokens, segments, jnp.asarray(chosen), logp, temperature=jnp.ones(tokens.shape), group=jnp.arange(len(answers))
    )
