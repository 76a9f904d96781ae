"""Prompts followed by given completions, as trajectories for supervised fine-tuning."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rljax.data.examples import Example
from rljax.types import PromptBatch, Trajectory, trajectory_of_tokens

EMPTY = Example([], [], [], {})  # a row without a token: it fills up a batch, and teaches nothing


def collate(examples: Sequence[Example], width: int, pad: int = 0) -> Trajectory:
    """Examples, each in a row of `width` tokens (width - 1 decisions), padded on the right.

    Decisions are the tokens that the mask of an example marks. Raises ValueError for an example that is longer.
    """
    return collate_after_prompts(examples, 0, width, pad)


def collate_after_prompts(examples: Sequence[Example], prompt_tokens: int, max_tokens: int, pad: int = 0) -> Trajectory:
    """Examples whose completions all begin in the same column, so that completions of one prompt can share it.

    Prompts are padded on the left to `prompt_tokens`, completions on the right to `max_tokens`. With prompt_tokens = 0
    a row is padded on the right only. Raises ValueError for an example that does not fit.
    """
    shape = (len(examples), prompt_tokens + max_tokens)
    tokens = np.full(shape, pad, np.int32)
    segments = np.zeros(shape, np.int32)
    chosen = np.zeros(shape, bool)
    for row, example in enumerate(examples):
        start = prompt_tokens - len(example.prompt) if prompt_tokens else 0
        middle = start + len(example.prompt)
        end = middle + len(example.completion)
        if start < 0 or end > shape[1]:
            lengths = f"{len(example.prompt)} tokens and {len(example.completion)} of completion"
            room = f"{prompt_tokens} and {max_tokens}" if prompt_tokens else f"{max_tokens} together"
            raise ValueError(f"example {row} of the batch has a prompt of {lengths}; at most {room} fit")
        tokens[row, start:end] = [*example.prompt, *example.completion]
        segments[row, start:end] = 1
        chosen[row, middle:end] = example.mask
    return trajectory_of_tokens(
        tokens,
        segments,
        jnp.asarray(chosen),
        logp=jnp.zeros(shape),
        temperature=jnp.ones(shape),
        group=jnp.arange(len(examples)),
    )


def demonstrations(rows: PromptBatch, completions: Sequence[list[int]], max_tokens: int) -> Trajectory:
    """Each prompt followed by its completion (ids, EOS included), padded on the right to `max_tokens` of them.

    Raises ValueError for a completion that is longer.
    """
    prompts = [tokens[mask].tolist() for tokens, mask in zip(rows.tokens, rows.mask, strict=True)]
    examples = [
        Example(prompt, list(ids), [True] * len(ids), {}) for prompt, ids in zip(prompts, completions, strict=True)
    ]
    return collate_after_prompts(examples, rows.tokens.shape[1], max_tokens)
