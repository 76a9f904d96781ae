"""The table in the docstring of ops/kl.py, by exact enumeration of a categorical. Peers: tests/golden/estimation.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import kl

LOGITS, REF, OLD = np.random.default_rng(0).normal(size=(3, 6))


def close(got, want, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=rtol, atol=atol)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


P, Q, P_OLD = softmax(LOGITS), softmax(REF), softmax(OLD)
FORWARD = (P * np.log(P / Q)).sum()  # KL(π ‖ π_ref)
FORWARD_GRADIENT = P * (np.log(P / Q) - FORWARD)  # by the logits of π
REVERSE_GRADIENT = P - Q  # of KL(π_ref ‖ π)


def averages(estimator, drawn_from, *more):
    """Mean over the draws of the value, and of the gradient by the logits of π."""

    def mean(logits):
        logp = jax.nn.log_softmax(logits)
        return (jnp.float32(drawn_from) * estimator(logp, jnp.log(jnp.float32(Q)), *more)).sum()

    return jax.value_and_grad(mean)(jnp.float32(LOGITS))


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        (kl.k1, FORWARD, 0 * P),
        (kl.k2, (P * np.log(P / Q) ** 2).sum() / 2, FORWARD_GRADIENT),
        (kl.k3, FORWARD, REVERSE_GRADIENT),
        (kl.k1_with_k2_gradient, FORWARD, FORWARD_GRADIENT),
        (kl.k3_with_k2_gradient, FORWARD, FORWARD_GRADIENT),
    ],
)
def test_on_policy_means_are_those_of_the_table(estimator, value, gradient):
    got = averages(estimator, P)
    close(got[0], value)
    close(got[1], gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "mean"),
    [
        (kl.importance_weighted_k1, FORWARD),
        (kl.importance_weighted_k2, (P * np.log(P / Q) ** 2).sum() / 2),
        (kl.importance_weighted_k3, FORWARD),
    ],
)
@pytest.mark.parametrize("drawn_from", [P, P_OLD], ids=["on-policy", "off-policy"])
def test_importance_weighted_means_are_those_of_the_table_off_policy_too(estimator, mean, drawn_from):
    value, gradient = averages(estimator, drawn_from, jnp.log(jnp.float32(drawn_from)))
    close(value, mean)
    close(gradient, FORWARD_GRADIENT, atol=1e-6)


def test_the_absolute_difference_has_the_gradient_of_neither_kl():
    value, gradient = averages(kl.absolute, P)
    close(value, (P * np.abs(np.log(P / Q))).sum())
    signs = np.sign(np.log(P / Q))
    close(gradient, P * (signs - (P * signs).sum()))
    assert min(np.abs(gradient - other).max() for other in (FORWARD_GRADIENT, REVERSE_GRADIENT)) > 0.05


def test_the_absolute_difference_has_no_slope_where_the_two_agree():
    assert jax.grad(kl.absolute)(jnp.float32(-1.5), jnp.float32(-1.5)) == 0
    assert jax.grad(kl.absolute)(jnp.float32(-1.5), jnp.float32(-1.0)) == -1


def test_the_gradients_of_the_table_are_those_of_the_kls():
    exact = {
        "forward": lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - jnp.log(jnp.float32(Q)))).sum(),
        "reverse": lambda z: -(jnp.float32(Q) * jax.nn.log_softmax(z)).sum(),
    }
    close(jax.grad(exact["forward"])(jnp.float32(LOGITS)), FORWARD_GRADIENT)
    close(jax.grad(exact["reverse"])(jnp.float32(LOGITS)), REVERSE_GRADIENT)


@pytest.mark.parametrize("d", [-60.0, 60.0])
def test_far_from_the_reference_exponents_stop_at_20_and_nothing_overflows(d):
    logp, ref = jnp.float32(min(d, 0)), jnp.float32(min(-d, 0))
    for estimator in (kl.k3, kl.k3_with_k2_gradient):
        value, slope = jax.value_and_grad(estimator)(logp, ref)
        clamped = min(-d, 20)  # far above the reference the linear part still pulls back
        close(value, np.expm1(clamped) - clamped, rtol=1e-5)
        close(slope, d if estimator is not kl.k3 else 1 if d > 0 else 0)
    assert jnp.isfinite(kl.importance_weighted_k3(logp, ref, ref))


def test_exact_kl_and_cross_entropy_of_categoricals():
    z, q = jnp.float32(LOGITS), jnp.float32(REF)
    close(kl.categorical_kl(z, q), FORWARD)
    close(jax.grad(kl.categorical_kl)(z, q), FORWARD_GRADIENT)
    close(jax.grad(kl.categorical_kl, 1)(q, z), softmax(LOGITS) - softmax(REF))
    close(kl.cross_entropy(z, q), -(P * np.log(Q)).sum())
    close(kl.cross_entropy(z, z), -(P * np.log(P)).sum())
    stacked = kl.categorical_kl(jnp.stack([z, q])[None], jnp.stack([q, q])[None])
    close(stacked, [[FORWARD, 0.0]])


def test_tokens_of_probability_0_add_nothing_unless_only_the_reference_rules_them_out():
    z, q = jnp.float32(LOGITS).at[2].set(-jnp.inf), jnp.float32(REF)
    p = softmax(np.delete(LOGITS, 2))
    close(kl.categorical_kl(z, q), (p * np.log(p / np.delete(Q, 2))).sum())
    close(kl.categorical_kl(z, q.at[2].set(-jnp.inf)), (p * np.log(p / softmax(np.delete(REF, 2)))).sum())
    for both in (kl.categorical_kl, kl.cross_entropy):
        slopes = jax.grad(both, (0, 1))(z, q.at[2].set(-jnp.inf))
        assert all(jnp.isfinite(slope).all() and slope[2] == 0 and jnp.abs(slope).max() > 0.01 for slope in slopes)
        assert both(q, z) == jnp.inf
    far = jnp.float32([0.0, -200.0])  # exp underflows, the log-prob does not
    assert kl.categorical_kl(far, jnp.float32([0.0, -jnp.inf])) == 0


def test_exact_kl_and_entropy_of_gaussians_are_those_of_a_fine_histogram():
    mean, std, ref_mean, ref_std = 0.3, 0.8, -0.5, 1.7
    x = np.linspace(-12, 12, 200_001)
    density = lambda m, s: np.exp(-((x - m) ** 2) / (2 * s * s)) / (s * np.sqrt(2 * np.pi))  # noqa: E731
    p, q = density(mean, std), density(ref_mean, ref_std)
    step = x[1] - x[0]
    args = [jnp.full(2, value) for value in (mean, std, ref_mean, ref_std)]
    close(kl.gaussian_kl(*args), [(p * np.log(p / q)).sum() * step] * 2)
    close(kl.gaussian_entropy(args[1]), [-(p * np.log(p)).sum() * step] * 2)
    close(kl.gaussian_kl(*args[:2], *args[:2]), [0.0, 0.0])


def test_exact_divergences_of_half_precision_logits_are_taken_in_float32():
    z, q = jnp.bfloat16(LOGITS), jnp.bfloat16(REF)
    assert kl.categorical_kl(z, q).dtype == kl.cross_entropy(z, q).dtype == jnp.float32
    with jax.enable_x64(True):
        np.testing.assert_allclose(kl.categorical_kl(jnp.asarray(LOGITS), jnp.asarray(REF)), FORWARD, rtol=1e-12)
