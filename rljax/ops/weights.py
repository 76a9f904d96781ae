"""Loss aggregation: loss = Σ weight · term.

Each aggregation mode is one function (mask, segments) -> weight [B T], with the name that verl's `loss_agg_mode` has
for it. It sees the whole optimizer batch before that is split into micro-batches or shards, so that a plain sum is
exact however it is split. A sequence is one segment of one row; sequences without a decision weigh 0, and N⁺ counts the
others.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.ops.sequences import sequence_lengths
from rljax.ops.shapes import PerToken, Segments, TokenMask

LossWeights = Callable[[TokenMask, Segments], PerToken]  # (mask, segments) -> weight


def _per_token(mask: TokenMask, segments: Segments) -> PerToken:
    """1/n_i on each decision, 0 elsewhere: sums to N⁺."""
    return jnp.where(mask, 1.0 / jnp.maximum(sequence_lengths(mask, segments), 1.0), 0.0)


def token_mean(mask: TokenMask, segments: Segments = None) -> PerToken:
    """1/Σm: all tokens weigh the same (DAPO, CISPO, PPO)."""
    return mask / jnp.maximum(mask.sum(), 1).astype(float)


def seq_mean_token_mean(mask: TokenMask, segments: Segments = None) -> PerToken:
    """1/(N⁺ n_i): tokens averaged, then sequences averaged (GRPO, GSPO, SAPO)."""
    share = _per_token(mask, segments)
    return share / jnp.maximum(share.sum(), 1.0)


def seq_mean_token_sum(mask: TokenMask, segments: Segments = None) -> PerToken:
    """1/N⁺: tokens summed, then sequences averaged: the log-prob of a sequence (REINFORCE, RLOO)."""
    return mask / jnp.maximum(_per_token(mask, segments).sum(), 1.0)


def seq_mean_token_sum_norm(length: float) -> LossWeights:
    """1/(N⁺ C) with a constant C, the longest completion allowed (Dr.GRPO, arXiv:2503.20783)."""

    def weights(mask: TokenMask, segments: Segments = None) -> PerToken:
        return seq_mean_token_sum(mask, segments) / length

    return weights


def token_sum(mask: TokenMask, segments: Segments = None) -> PerToken:
    """1: no normalization; the gradient grows with the batch."""
    return mask.astype(float)


def over_all_rows(weights: LossWeights) -> LossWeights:
    """The weights divided by all B rows, not by the N⁺ with a decision (TRL, ms-swift). For rows not packed."""

    def rescaled(mask: TokenMask, segments: Segments = None) -> PerToken:
        return weights(mask, segments) * (mask.any(axis=1).sum() / mask.shape[0])

    return rescaled
