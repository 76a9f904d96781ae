"""Supervised fine-tuning: L = -(1/Σm) Σ log π(a_t | s_t) over the answers' tokens of the whole batch.

An Algorithm like the others, whose rows are demonstrations: it passes the same laws (micro-batch, shard, mask).
"""

from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch


def sft() -> Algorithm:
    """Maximum likelihood of demonstrations."""

    def credit(traj, coefficients):
        advantages = traj.mask.astype(traj.logp.dtype)
        return Batch(traj=traj, advantages=advantages, mask=traj.mask, coefficients=coefficients)

    def loss(output, batch):
        return -output.logp, {}

    return Algorithm(credit=credit, loss=loss, weights=token_mean)
