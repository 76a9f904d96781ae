"""Where a peer computes something else than rljax: what turns our answer into theirs, and why ours differs.

Used by the tables of tests/golden only. Nothing here is a recommendation.
"""

import jax.numpy as jnp

# --------------------------------------------------------------------------------------------------------- preferences


def trl_float32_mean(share):
    """TRL averages booleans (accuracies) in float32 whatever the model's width."""
    return jnp.float32(share)


def trl_weight_by_log_probs(loss_type: str, weight: float) -> float:
    """TRL's sft term is a cross-entropy of the logits, apart from the log-probs that the other terms of DPO share: the
    gradient by those does not see it."""
    return 0.0 if loss_type == "sft" else weight


def openrlhf_sequence_mean(weights):
    """OpenRLHF adds 1e-8 to the tokens of a row, and its mean over the rows counts those without tokens."""

    def dialect(mask, segments=None):
        n, said = mask.sum(axis=1, keepdims=True), mask.any(axis=1).mean()
        return weights(mask, segments) * n / (n + 1e-8) * said

    return dialect
