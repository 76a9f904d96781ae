"""Loss aggregation: loss = Σ weight · term.

Each aggregation mode is one function (mask, segments, group) -> weight [B T], with the name that verl's `loss_agg_mode`
has for it. It sees the whole optimizer batch before that is split into micro-batches or shards, so that a plain sum is
exact however it is split. A sequence is one segment of one row; sequences without a decision weigh 0, and N⁺ counts the
others. `group` tells prompts apart: [B] ids of rows, or [B T] ids of columns where rows are packed. Only `prompt_mean`
reads it.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.ops.groups import group_sum
from rljax.ops.sequences import sequence_lengths
from rljax.ops.shapes import PerToken, PromptIds, Segments, TokenMask

LossWeights = Callable[[TokenMask, Segments, PromptIds], PerToken]  # (mask, segments, group) -> weight


def _per_token(mask: TokenMask, segments: Segments) -> PerToken:
    """1/n_i on each decision, 0 elsewhere: sums to N⁺."""
    return jnp.where(mask, 1.0 / jnp.maximum(sequence_lengths(mask, segments), 1.0), 0.0)


def token_mean(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
    """1/Σm: all tokens weigh the same (DAPO, CISPO, PPO)."""
    return mask / jnp.maximum(mask.sum(), 1).astype(float)


def seq_mean_token_mean(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
    """1/(N⁺ n_i): tokens averaged, then sequences averaged (GRPO, GSPO, SAPO)."""
    share = _per_token(mask, segments)
    return share / jnp.maximum(share.sum(), 1.0)


def seq_mean_token_sum(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
    """1/N⁺: tokens summed, then sequences averaged: the log-prob of a sequence (REINFORCE, RLOO)."""
    return mask / jnp.maximum(_per_token(mask, segments).sum(), 1.0)


def seq_mean_token_sum_norm(length: float) -> LossWeights:
    """1/(N⁺ C) with a constant C, the longest completion allowed (Dr.GRPO, arXiv:2503.20783)."""

    def weights(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
        return seq_mean_token_sum(mask, segments) / length

    return weights


def prompt_mean(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
    """1/(P⁺ n_g): tokens of each prompt averaged, then the P⁺ prompts with a decision averaged.

    n_g counts the decisions of all completions of the prompt. The "prompt average" of ScaleRL (arXiv:2510.13786,
    section 3.2), and the objective of DAPO as written (arXiv:2503.14476, section 3). Raises ValueError without `group`.
    """
    if group is None:
        raise ValueError("prompt_mean needs Trajectory.group, which says which rows share a prompt; it is None")
    if group.ndim == 1:
        length = group_sum(mask.sum(axis=1).astype(float), group)[:, None]
    else:
        length = group_sum(mask.ravel().astype(float), group.ravel()).reshape(mask.shape)
    share = jnp.where(mask, 1.0 / jnp.maximum(length, 1.0), 0.0)
    return share / jnp.maximum(share.sum(), 1.0)


def token_sum(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
    """1: no normalization; the gradient grows with the batch."""
    return mask.astype(float)


def over_all_rows(weights: LossWeights) -> LossWeights:
    """The weights divided by all B rows, not by the N⁺ with a decision (TRL, ms-swift). For rows not packed."""

    def rescaled(mask: TokenMask, segments: Segments = None, group: PromptIds = None) -> PerToken:
        return weights(mask, segments, group) * (mask.any(axis=1).sum() / mask.shape[0])

    return rescaled
