"""TRPO's step against the Fisher matrix of a tabular softmax policy, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rljax.ops.kl import categorical_kl
from rljax.ops.trust_region import (
    conjugate_gradient,
    directed_kl,
    hessian_vector_product,
    line_search,
    natural_gradient_step,
)
from tests import bounds

STATES, ACTIONS = 4, 3
draw = np.random.default_rng(0)
LOGITS, ADVANTAGES = draw.normal(size=(2, STATES, ACTIONS))
VISITS = draw.dirichlet(np.ones(STATES))
VECTOR = draw.normal(size=STATES * ACTIONS)
POLICY = np.exp(log_softmax(LOGITS, axis=1))
DAMPING, DELTA = 0.1, 0.01


def fisher():
    """Of the logits: a block diag(π) - π πᵀ a state, weighted by its visits."""
    out = np.zeros((STATES, ACTIONS, STATES, ACTIONS))
    for s, (visits, p) in enumerate(zip(VISITS, POLICY, strict=True)):
        out[s, :, s] = visits * (np.diag(p) - np.outer(p, p))
    return out.reshape(STATES * ACTIONS, -1)


def gradient():
    """Of -E Â under the policy, the advantages held fixed."""
    centered = ADVANTAGES - (POLICY * ADVANTAGES).sum(axis=1, keepdims=True)
    return -(VISITS[:, None] * POLICY * centered).ravel()


def rounding(matrix, solution) -> float:
    """Of conjugate gradients: as many iterations as rows, of sums of as many terms, times the matrix's condition."""
    return bounds.of_sum(len(matrix) ** 2 * np.linalg.cond(matrix), np.abs(solution).max())


def start():
    return {"logits": jnp.float32(LOGITS), "critic": jnp.float32([1.5, -2.5])}


def surrogate(params):
    return -(jnp.float32(VISITS)[:, None] * jax.nn.softmax(params["logits"]) * jnp.float32(ADVANTAGES)).sum()


def mean_kl(params, direction="old_new"):
    return jnp.float32(VISITS) @ directed_kl(jnp.float32(LOGITS), params["logits"], direction)


def measure(params):
    return surrogate(params), mean_kl(params)


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_products_are_those_of_the_hessian_and_of_the_fisher_matrix(direction):
    def f(flat):
        return mean_kl({"logits": flat.reshape(STATES, ACTIONS)}, direction)

    flat, vector = jnp.float32(LOGITS).ravel(), jnp.float32(VECTOR)
    got = jax.jit(lambda x, v: hessian_vector_product(f, x)(v))(flat, vector)
    np.testing.assert_allclose(got, jax.jit(jax.hessian(f))(flat) @ vector, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got, fisher() @ VECTOR, rtol=1e-4, atol=1e-6)


def test_conjugate_gradients_solve():
    matrix = fisher() + DAMPING * np.eye(STATES * ACTIONS)
    solve = jax.jit(lambda A, b: conjugate_gradient(lambda v: A @ v, b, iterations=12))
    got, residual = solve(jnp.float32(matrix), jnp.float32(VECTOR))
    want = np.linalg.solve(matrix, VECTOR)
    np.testing.assert_allclose(residual, VECTOR - matrix @ got, atol=rounding(matrix, VECTOR))
    np.testing.assert_allclose(got, want, rtol=0, atol=rounding(matrix, want))
    np.testing.assert_array_equal(solve(jnp.float32(matrix), jnp.zeros(STATES * ACTIONS))[0], 0.0)


def test_fewer_iterations_are_fewer():
    """One step of steepest descent on ½ xᵀAx - bᵀx."""
    matrix, b = np.diag([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])
    got, residual = conjugate_gradient(lambda v: jnp.float32(matrix) @ v, jnp.float32(b), iterations=1)
    want = b * (b @ b) / (b @ matrix @ b)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(residual, b - matrix @ want, rtol=1e-5)


def test_the_step_is_the_natural_gradient_scaled_to_the_trust_region():
    found = jax.jit(lambda p: natural_gradient_step(mean_kl, p, jax.grad(surrogate)(p), DELTA, DAMPING, 12))(start())
    g, matrix = gradient(), fisher() + DAMPING * np.eye(STATES * ACTIONS)
    x = np.linalg.solve(matrix, -g)
    want = np.sqrt(2 * DELTA / (x @ matrix @ x)) * x
    np.testing.assert_array_equal(found.change[:2], 0.0)  # the critic, first by name
    np.testing.assert_allclose(found.change[2:], want, rtol=0, atol=rounding(matrix, want))
    np.testing.assert_allclose(
        found.expected_improvement, -g @ want, rtol=0, atol=rounding(matrix, want) * np.abs(g).sum()
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e12, 1e30])
def test_the_scale_of_the_surrogate_does_not_change_the_step(scale):
    step = jax.jit(lambda p, g: natural_gradient_step(mean_kl, p, g, DELTA, DAMPING, 12))
    slope = jax.grad(surrogate)(start())
    want = step(start(), slope)
    got = step(start(), jax.tree.map(lambda x: jnp.float32(scale) * x, slope))
    assert jnp.abs(want.change).max() > 0.01
    limit = rounding(fisher() + DAMPING * np.eye(STATES * ACTIONS), want.change)
    np.testing.assert_allclose(got.change, want.change, rtol=0, atol=limit)
    np.testing.assert_allclose(got.expected_improvement, scale * want.expected_improvement, rtol=1e-3)


def test_without_a_gradient_the_step_is_0():
    found = natural_gradient_step(mean_kl, start(), jax.tree.map(jnp.zeros_like, start()), DELTA, DAMPING)
    np.testing.assert_array_equal(found.change, 0.0)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_what_is_accepted_is_the_first_candidate_within_delta_that_improves(scale):
    found = natural_gradient_step(mean_kl, start(), jax.grad(surrogate)(start()), DELTA, 1e-3)
    change = scale * found.change
    search = jax.jit(lambda p, c: line_search(measure, p, surrogate(p), c, DELTA, shrink=0.7))(start(), change)
    assert search.accepted == 1
    for j in range(10):
        logits = LOGITS + 0.7**j * np.float64(change[2:]).reshape(STATES, ACTIONS)
        log_q = log_softmax(logits, axis=1)
        kl = VISITS @ (POLICY * (np.log(POLICY) - log_q)).sum(axis=1)
        better = (VISITS[:, None] * (np.exp(log_q) - POLICY) * ADVANTAGES).sum()
        if kl <= DELTA and better > 0:
            break
    assert search.trials == j + 1
    np.testing.assert_allclose(search.params["logits"], logits, rtol=1e-5)
    np.testing.assert_array_equal(search.params["critic"], start()["critic"])
    np.testing.assert_allclose([search.kl, search.improvement], [kl, better], rtol=1e-3)
    assert search.kl <= DELTA


@pytest.mark.parametrize("bad", ["uphill", "too far", "not a number"])
def test_a_search_that_fails_leaves_every_bit(bad):
    found = natural_gradient_step(mean_kl, start(), jax.grad(surrogate)(start()), DELTA, DAMPING)
    change = {"uphill": -1.0, "too far": 1e6, "not a number": jnp.nan}[bad] * found.change
    search = jax.jit(lambda p, c: line_search(measure, p, surrogate(p), c, DELTA, trials=4))(start(), change)
    assert (search.accepted, search.trials, search.kl, search.improvement) == (0, 4, 0, 0)
    for name, x in start().items():
        np.testing.assert_array_equal(search.params[name], x)


def test_directions():
    p, q = jnp.float32(LOGITS[0]), jnp.float32(LOGITS[1])
    assert directed_kl(p, q) == categorical_kl(p, q)
    assert directed_kl(p, q, "new_old") == categorical_kl(q, p)
    with pytest.raises(ValueError, match="old_new"):
        directed_kl(p, q, "forward")
