"""Supervised fine-tuning: imitation of demonstrations, and the same with each token weighted by its probability.

    sft    L = -(1/Σm) Σ log π(a_t | s_t)                        over the completions' tokens of the whole batch
    dft    L = -(1/Σm) Σ sg(π(a_t | s_t)) log π(a_t | s_t)

An Algorithm like the others, whose rows are demonstrations: it passes the same laws (micro-batch, shard, mask).
`weights` says what weighs the same: tokens, or sequences (`ops.weights.seq_mean_token_mean`). Packed rows are fine: the
first token of a segment is not a target (`trajectory_of_tokens`).
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch, WeightsFn


def sft(weights: WeightsFn = token_mean) -> Algorithm:
    """Maximum likelihood of demonstrations."""

    def credit(traj, coefficients):
        advantages = traj.mask.astype(traj.logp.dtype)
        return Batch(traj=traj, advantages=advantages, mask=traj.mask, coefficients=coefficients)

    def loss(output, batch):
        return -output.logp, {}

    return Algorithm(credit=credit, loss=loss, weights=weights, off_policy="itself")


def dft(weights: WeightsFn = token_mean) -> Algorithm:
    """Dynamic fine-tuning (arXiv:2508.05629): -sg(π) log π, so that unlikely tokens do not dominate."""

    def loss(output, batch):
        return -stop_gradient(jnp.exp(output.logp)) * output.logp, {}

    return sft(weights)._replace(loss=loss)
