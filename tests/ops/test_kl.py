"""The table in the docstring of ops/kl.py, by exact enumeration of a categorical; and the peers' estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import kl
from tests.ops.golden import close, golden

LOGITS, REF, OLD = np.random.default_rng(0).normal(size=(3, 6))


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
        (kl.k3_with_k2_gradient, FORWARD, FORWARD_GRADIENT),
    ],
)
def test_on_policy_means_are_those_of_the_table(estimator, value, gradient):
    got = averages(estimator, P)
    close(got[0], value)
    close(got[1], gradient, atol=1e-6)


def test_the_importance_weighted_estimator_is_right_off_policy_too():
    for drawn_from in (P, P_OLD):
        value, gradient = averages(kl.importance_weighted_k3, drawn_from, jnp.log(jnp.float32(drawn_from)))
        close(value, FORWARD)
        close(gradient, FORWARD_GRADIENT, atol=1e-6)


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
        clamped = -np.clip(d, -20, 20)
        close(value, np.expm1(clamped) - clamped, rtol=1e-5)
        close(slope, 0 if estimator is kl.k3 else d)
    assert jnp.isfinite(kl.importance_weighted_k3(logp, ref, ref))


@pytest.mark.parametrize(
    ("recorded", "case", "estimator"),
    [
        ("verl_kl_penalty", "k1", kl.k1),
        ("verl_kl_penalty", "k2", kl.k2),
        ("verl_kl_penalty", "k3", kl.k3),
        ("verl_kl_penalty", "k3plus_intended", kl.k3_with_k2_gradient),
        ("verl_new_kl_penalty", "k3+", kl.k3_with_k2_gradient),
    ],
)
def test_verl_kl_penalty(shared, recorded, case, estimator):
    """verl also clamps k3's value to ±10, and its gradient there to 0: compared below that."""
    _, ins, outs = golden(shared, recorded)[case]
    logp, ref = ins["logprob"], ins["ref_logprob"]
    near = (np.asarray(ref - logp) < 2.3) & (np.asarray(kl.k3(logp, ref)) < 10)
    close(estimator(logp, ref), outs["kl"], near)
    slope = jax.grad(lambda x: estimator(x, ref).sum())(logp)
    close(slope, outs["grad_sum_logprob"], near)


def test_tunix_kl(shared):
    for case, (_, ins, outs) in golden(shared, "tunix_kl").items():
        pair = ins["per_token_logps"], ins["ref_per_token_logps"]
        for name, estimator in {"kl": kl.k1, "mse_kl": kl.k2, "low_var_kl": kl.k3}.items():
            close(estimator(*pair), outs[name], case=(case, name))
