"""How the terms of a batch become one sum: loss = Σ weight · term.

Every "aggregation mode" of the field is one function (mask, segments) -> weight [B T]. It sees the whole optimizer
batch before that is cut into micro-batches or shards, so that a plain sum is exact however it is cut. A sequence is one
segment of one row; sequences without a decision (N⁺ counts the others) weigh nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.sequences import sequence_lengths

Mask = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None
Weight = Float[Array, "B T"]


def _per_token(mask: Mask, segments: Segments) -> Weight:
    """1/n_i on each decision, 0 elsewhere: sums to N⁺."""
    return jnp.where(mask, 1.0 / jnp.maximum(sequence_lengths(mask, segments), 1.0), 0.0)


def token_mean(mask: Mask, segments: Segments = None) -> Weight:
    """1/Σm: every token alike (DAPO, CISPO, PPO)."""
    return mask / jnp.maximum(mask.sum(), 1).astype(float)


def seq_mean_token_mean(mask: Mask, segments: Segments = None) -> Weight:
    """1/(N⁺ n_i): every sequence alike, its tokens averaged (GRPO, GSPO, SAPO)."""
    share = _per_token(mask, segments)
    return share / jnp.maximum(share.sum(), 1.0)


def seq_mean_token_sum(mask: Mask, segments: Segments = None) -> Weight:
    """1/N⁺: tokens summed, sequences averaged: the log-prob of a sequence (REINFORCE, RLOO)."""
    return mask / jnp.maximum(_per_token(mask, segments).sum(), 1.0)


def seq_mean_token_sum_norm(length: float):
    """1/(N⁺ C) with a constant C, the most tokens an answer may have (Dr.GRPO, arXiv:2503.20783)."""

    def weights(mask: Mask, segments: Segments = None) -> Weight:
        return seq_mean_token_sum(mask, segments) / length

    return weights


def token_sum(mask: Mask, segments: Segments = None) -> Weight:
    """1: no divisor; the gradient grows with the batch."""
    return mask.astype(float)


def over_all_rows(weights):
    """The weights with a divisor of all B rows, not of the N⁺ that have a decision (TRL, ms-swift). Unpacked rows."""

    def shared(mask: Mask, segments: Segments = None) -> Weight:
        return weights(mask, segments) * (mask.any(axis=1).sum() / mask.shape[0])

    return shared
