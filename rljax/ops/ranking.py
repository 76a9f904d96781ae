"""Losses of reward models, to be minimized, unreduced: of pairs, of rankings and of reasoning steps.

Candidates of one prompt are on the last axis, best first; `valid` is False where there is none.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from rljax.ops.shapes import Elementwise, PerRow

RankedScores = Float[Array, "*P K"]
RankedMask = Bool[Array, "*P K"]


def bradley_terry(chosen: PerRow, rejected: PerRow, margin: PerRow | float = 0.0) -> PerRow:
    """-log σ(r_w - r_l - m) (InstructGPT, arXiv:2203.02155, eq. 1; the margin: Llama 2, arXiv:2307.09288, eq. 2)."""
    return -log_sigmoid(chosen - rejected - margin)


def center_rewards_penalty(chosen: PerRow, rejected: PerRow) -> PerRow:
    """(r_w + r_l)²: keeps the scores, which are defined up to a constant, around zero (arXiv:2312.09244)."""
    return (chosen + rejected) ** 2


def plackett_luce(scores: RankedScores, valid: RankedMask) -> Float[Array, "*P"]:
    """-Σ_k [r_k - log Σ_{j≥k} e^{r_j}]: minus the log-probability of the order; two candidates are Bradley-Terry."""
    lowest = jnp.finfo(scores.dtype).min
    rest = jax.lax.cumlogsumexp(jnp.where(valid, scores, lowest), axis=scores.ndim - 1, reverse=True)
    return jnp.where(valid, rest - scores, 0.0).sum(axis=-1)


def pairs_in_order(scores: RankedScores, valid: RankedMask) -> tuple[Bool[Array, "*P K K"], Bool[Array, "*P K K"]]:
    """Of candidates i and j, i ranked before j: whether the scores agree, and whether both are there."""
    before = jnp.triu(jnp.ones((scores.shape[-1],) * 2, bool), 1)
    pairs = valid[..., :, None] & valid[..., None, :] & jnp.expand_dims(before, range(scores.ndim - 1))
    return pairs & (scores[..., :, None] > scores[..., None, :]), pairs


def kwise(scores: RankedScores, valid: RankedMask) -> Float[Array, "*P"]:
    """Mean of -log σ(r_i - r_j) over the C(K, 2) pairs, i ranked before j, of one prompt (InstructGPT); 0 without a
    pair.
    """
    scores = jnp.where(valid, scores, 0.0)
    _, pairs = pairs_in_order(scores, valid)
    terms = jnp.where(pairs, -log_sigmoid(scores[..., :, None] - scores[..., None, :]), 0.0)
    return terms.sum(axis=(-2, -1)) / jnp.maximum(pairs.sum(axis=(-2, -1)), 1)


def step_cross_entropy(log_odds: Elementwise, label: Elementwise) -> Elementwise:
    """-y log σ(z) - (1 - y) log σ(-z) of the log-odds z that a step is correct. The label y is 0 or 1
    (arXiv:2305.20050) or the fraction of its continuations that were correct (Math-Shepherd, arXiv:2312.08935, soft
    estimation).
    """
    return -label * log_sigmoid(log_odds) - (1.0 - label) * log_sigmoid(-log_odds)


def min_over_steps(p: RankedScores, valid: RankedMask) -> Float[Array, "*P"]:
    """min over the steps of the probability that each is correct; 1 for a completion without steps."""
    return jnp.where(valid, p, 1.0).min(axis=-1)


def product_over_steps(p: RankedScores, valid: RankedMask) -> Float[Array, "*P"]:
    """Π over the steps: the probability that all are correct (arXiv:2305.20050); 1 without steps."""
    return jnp.where(valid, p, 1.0).prod(axis=-1)


def last_step(p: RankedScores, valid: RankedMask) -> Float[Array, "*P"]:
    """The probability at the last step; 1 without steps."""
    last = valid & (jnp.cumsum(valid[..., ::-1], axis=-1)[..., ::-1] == 1)
    return jnp.where(valid.any(axis=-1), jnp.where(last, p, 0.0).sum(axis=-1), 1.0)
