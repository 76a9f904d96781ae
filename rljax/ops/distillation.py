"""Divergences between the next-token distributions of a student q and a teacher p, and estimates from fewer tokens.

    name              what is compared                               against the divergence over the whole vocabulary
    full_vocabulary   all V tokens                                   is it
    top_k             the k likeliest tokens, and all others as one  never more than it
    sampled_token     the token that the student sampled             unbiased in value and gradient, only for KL(q ‖ p)

Each is (student logits [*N V], teacher logits [*N V], tokens [*N]) -> [*N] in nats, of logits z/τ, so that all can be
computed in chunks. β lies between 0, KL(p ‖ q), and 1, KL(q ‖ p). The teacher is a constant to the caller.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.kl import Logits, categorical_kl, k1_with_k2_gradient
from rljax.ops.logprobs import chosen_logp, log_sum_exp

DivergenceOfLogits = Callable[[Logits, Logits, Int[Array, "*N"]], Float[Array, "*N"]]  # (student, teacher, tokens)
EstimatorFn = Callable[[float], DivergenceOfLogits]  # β -> the divergence


class TokenComparison(NamedTuple):
    """What the two models say of each decision, in nats."""

    divergence: Float[Array, "*N"]
    logp: Float[Array, "*N"]  # log q of the token, of the student
    teacher_logp: Float[Array, "*N"]  # log p of the token


def generalized_jsd(student_logits: Logits, teacher_logits: Logits, beta: float = 0.5) -> Float[Array, "*N"]:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q (GKD, arXiv:2306.13649, eq. 1).

    At β = 0 and 1, where this is 0, its limits divided by β and by 1 - β: KL(p ‖ q) and KL(q ‖ p).
    Raises ValueError for another β.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"β weighs two divergences: it lies between 0 and 1, and is not {beta}")
    if beta == 0.0:
        return categorical_kl(teacher_logits, student_logits)
    if beta == 1.0:
        return categorical_kl(student_logits, teacher_logits)
    student_logp = student_logits - log_sum_exp(student_logits)[..., None]
    teacher_logp = teacher_logits - log_sum_exp(teacher_logits)[..., None]
    mixture = _log_add(teacher_logp + jnp.log(beta), student_logp + jnp.log1p(-beta))
    of_teacher = categorical_kl(teacher_logp, mixture)
    of_student = categorical_kl(student_logp, mixture)
    return beta * of_teacher + (1.0 - beta) * of_student


def _log_add(x, y):
    """log(eˣ + eʸ), -inf with no gradient where both are: a token that neither distribution has."""
    possible = jnp.maximum(x, y) > -jnp.inf
    return jnp.where(possible, jnp.logaddexp(jnp.where(possible, x, 0.0), jnp.where(possible, y, 0.0)), -jnp.inf)


def full_vocabulary(beta: float) -> DivergenceOfLogits:
    """`generalized_jsd` over all tokens."""

    def divergence(student_logits, teacher_logits, tokens):
        return generalized_jsd(student_logits, teacher_logits, beta)

    return divergence


def top_k(beta: float, k: int = 100, support: str = "student", tail: bool = True) -> DivergenceOfLogits:
    """`generalized_jsd` over the k tokens that the student (or the teacher) finds likeliest: `support` is "student" or
    "teacher".

    The probability of all other tokens is one further token, which makes this a lower bound of the divergence over the
    vocabulary; without `tail` the k are rescaled to sum to 1. Raises ValueError for another support.
    """
    if support not in ("student", "teacher"):
        raise ValueError(f"the support of top_k is the student's or the teacher's, not {support!r}")

    def divergence(student_logits, teacher_logits, tokens):
        ranked = student_logits if support == "student" else teacher_logits
        kept = min(k, ranked.shape[-1])
        _, indices = jax.lax.top_k(jax.lax.stop_gradient(ranked), kept)
        student_kept = _keep(student_logits, indices, tail)
        teacher_kept = _keep(teacher_logits, indices, tail)
        return generalized_jsd(student_kept, teacher_kept, beta)

    return divergence


def _keep(logits: Logits, indices: Int[Array, "*N k"], tail: bool) -> Float[Array, "*N K"]:
    """The logits at these indices, and as one further logit the log-sum-exp of the others."""
    kept = jnp.take_along_axis(logits, indices, axis=-1)
    if not tail or indices.shape[-1] == logits.shape[-1]:
        return kept
    others = jnp.put_along_axis(logits, indices, -jnp.inf, axis=-1, inplace=False)
    possible = (others > -jnp.inf).any(axis=-1, keepdims=True)  # the log of a sum of 0 has no gradient
    rest = log_sum_exp(jnp.where(possible, others, 0.0))[..., None]
    return jnp.concatenate([kept, jnp.where(possible, rest, -jnp.inf)], axis=-1)


def sampled_token(beta: float = 1.0) -> DivergenceOfLogits:
    """log q(a) - log p(a) of the token a ~ q, with the gradient of ½ (log q(a) - log p(a))².

    On average over a the value and the gradient are those of KL(q ‖ p) at this state. Raises ValueError for another β
    than 1: one sample of the student tells nothing of the other divergences.
    """
    if beta != 1.0:
        raise ValueError(f"a token of the student's estimates KL(student ‖ teacher), β = 1, and not β = {beta}")

    def divergence(student_logits, teacher_logits, tokens):
        one = jnp.ones(tokens.shape)
        return k1_with_k2_gradient(chosen_logp(student_logits, tokens, one), chosen_logp(teacher_logits, tokens, one))

    return divergence


def columns_of_same_decisions(mask: Bool[Array, "B T"], other_mask: Bool[Array, "B T2"]) -> Int[Array, "B T"]:
    """For the k-th decision of each row the column of the row's k-th decision in the other mask; else any column."""
    number = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    columns = jnp.argsort(~other_mask, axis=1, stable=True)
    return jnp.take_along_axis(columns, jnp.minimum(number, other_mask.shape[1] - 1), axis=1)
