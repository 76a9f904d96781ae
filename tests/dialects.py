"""Where a peer computes something else than rljax: what turns our answer into theirs, and why ours differs.

Used by the tables of tests/golden only. Nothing here is a recommendation.
"""

import jax.numpy as jnp

# --------------------------------------------------------------------------------------------------------- preferences


def trl_float32_mean(share):
    """TRL averages booleans (accuracies) in float32 whatever the model's width."""
    return jnp.float32(share)


def openrlhf_token_mean(weights):
    """OpenRLHF adds 1e-8 to the number of tokens it divides by."""

    def dialect(mask, segments=None):
        return weights(mask, segments) * mask.sum() / (mask.sum() + 1e-8)

    return dialect


def openrlhf_sequence_mean(weights):
    """As `openrlhf_token_mean` row by row; and its mean over the rows counts those without tokens."""

    def dialect(mask, segments=None):
        n, said = mask.sum(axis=1, keepdims=True), mask.any(axis=1).mean()
        return weights(mask, segments) * n / (n + 1e-8) * said

    return dialect
