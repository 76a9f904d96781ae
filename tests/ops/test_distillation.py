"""Divergences of a student and a teacher, against numpy in float64 and sums over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import distillation
from tests.ops.lifted import Lifted, close, float64  # noqa: F401 (the fixture)

d = Lifted(distillation)
N, V = 5, 7
STUDENT, TEACHER = np.random.default_rng(0).normal(scale=2.0, size=(2, N, V))
TOKENS = np.arange(N)
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def jsd(teacher, student, beta):
    """GKD, arXiv:2306.13649, eq. 1 and the limits in section 3, of probabilities."""
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def value(divergence, student=STUDENT, teacher=TEACHER, tokens=TOKENS):
    return np.asarray(divergence(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(tokens)))


def slope(divergence, student=STUDENT, teacher=TEACHER, tokens=TOKENS):
    """Gradient by the student's logits of the sum."""
    return jax.grad(lambda z: divergence(z, jnp.asarray(teacher), jnp.asarray(tokens)).sum())(jnp.asarray(student))


@pytest.mark.parametrize("beta", BETAS)
def test_the_generalized_divergence_is_the_papers(beta):
    p, q = softmax(TEACHER), softmax(STUDENT)
    close(d.generalized_jsd(STUDENT + 3.0, TEACHER - 2.0, beta), jsd(p, q, beta))
    close(value(d.full_vocabulary(beta)), jsd(p, q, beta))


def test_the_ends_are_the_limits_of_the_divergence_over_its_small_weight():
    p, q = softmax(TEACHER), softmax(STUDENT)
    small = 1e-6
    close(d.generalized_jsd(STUDENT, TEACHER, small) / small, kl(p, q), rtol=1e-4)
    close(d.generalized_jsd(STUDENT, TEACHER, 1 - small) / small, kl(q, p), rtol=1e-4)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_a_beta_outside_is_refused(beta):
    with pytest.raises(ValueError, match="between 0 and 1"):
        d.generalized_jsd(STUDENT, TEACHER, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_those_of_differences(beta):
    step = 1e-6
    want = np.zeros((N, V))
    for v in range(V):
        move = step * np.eye(V)[v]
        high, low = (jsd(softmax(TEACHER), softmax(STUDENT + sign * move), beta) for sign in (1, -1))
        want[:, v] = (high - low) / (2 * step)
    np.testing.assert_allclose(slope(d.full_vocabulary(beta)), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("divergence", [*map(d.full_vocabulary, (0.3, 1.0)), d.top_k(0.3, 3), d.top_k(1.0, V)])
def test_tokens_that_neither_has_change_nothing_and_give_no_nan(divergence):
    wide = np.full((N, 2), -np.inf)
    student, teacher = (np.concatenate([x, wide], axis=1) for x in (STUDENT, TEACHER))
    close(value(divergence, student, teacher), value(divergence))
    close(slope(divergence, student, teacher)[:, :V], slope(divergence))
    assert np.isfinite(slope(divergence, student, teacher)).all()


def coarse(x, order, k, tail):
    """Probabilities of the k tokens at these places, and of the others together."""
    ranked = np.take_along_axis(softmax(x), order, axis=1)
    top = ranked[:, :k]
    return (
        np.concatenate([top, ranked[:, k:].sum(axis=1, keepdims=True)], axis=1) if tail else top / top.sum(1)[:, None]
    )


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_top_k_compares_the_likeliest_and_the_others_as_one(support, tail, beta):
    order = np.argsort(-(STUDENT if support == "student" else TEACHER), axis=1)
    want = jsd(coarse(TEACHER, order, 3, tail), coarse(STUDENT, order, 3, tail), beta)
    close(value(d.top_k(beta, 3, support, tail)), want)
    step, found = 1e-6, slope(d.top_k(beta, 3, support, tail))
    for v in range(V):
        moved = [coarse(STUDENT + sign * step * np.eye(V)[v], order, 3, tail) for sign in (1, -1)]
        high, low = (jsd(coarse(TEACHER, order, 3, tail), q, beta) for q in moved)
        np.testing.assert_allclose(found[:, v], (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_top_k_is_below_the_whole_and_reaches_it(beta):
    whole = value(d.full_vocabulary(beta))
    last = np.zeros(N)
    for k in range(1, V + 1):
        found = value(d.top_k(beta, k))
        assert (found <= whole + 1e-12).all()
        assert (found >= last - 1e-12).all()  # the k + 1 likeliest split a bucket of the k likeliest
        last = found
    close(last, whole)
    close(value(d.top_k(beta, V + 5)), whole)


def test_another_support_is_refused():
    with pytest.raises(ValueError, match="student's or the teacher's"):
        d.top_k(0.5, support="both")


def test_a_sampled_token_has_the_value_and_the_gradient_of_the_reverse_kl_on_average():
    """Summed over all tokens, each with the student's probability."""
    mean, gradient = np.zeros(N), np.zeros((N, V))
    q = softmax(STUDENT)
    for v in range(V):
        tokens = np.full(N, v)
        mean += q[:, v] * value(d.sampled_token(1.0), tokens=tokens)
        gradient += q[:, [v]] * slope(d.sampled_token(1.0), tokens=tokens)
    close(mean, kl(q, softmax(TEACHER)))
    close(gradient, slope(d.full_vocabulary(1.0)))


def test_a_sampled_token_estimates_no_other_divergence():
    with pytest.raises(ValueError, match=r"β = 0\.5"):
        d.sampled_token(0.5)


def test_the_same_decisions_are_found_at_other_columns():
    mask = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    other = np.array([[1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    found = np.asarray(d.columns_of_same_decisions(mask, other))
    np.testing.assert_array_equal(found[mask], [0, 3, 5, 4])
    back = np.asarray(d.columns_of_same_decisions(other, mask))
    np.testing.assert_array_equal(back[other], [1, 2, 4, 0])
