"""Controllers by hand; the adaptive KL coefficient is also verl's (tests/golden/estimation.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms.common import controllers
from rljax.algorithms.common.controllers import adaptive_entropy, adaptive_kl, applied_entropy_coefficient


@pytest.mark.parametrize(("kl", "change"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (-9.0, -0.2)])
def test_adaptive_kl_moves_by_the_clipped_error(kl, change):
    got = adaptive_kl(0.2, kl, target=6.0, horizon=10_000, samples=500)
    np.testing.assert_allclose(got, 0.2 * (1 + change * 0.05), rtol=1e-6)


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (9.0, 2.0)]
)
def test_the_ppo_penalty_doubles_and_halves(kl, factor):
    np.testing.assert_allclose(controllers.ppo_penalty_coefficient(3.0, kl, 0.01), 3.0 * factor, rtol=1e-6)


def test_the_entropy_coefficient_rises_below_the_target_and_falls_above_it_within_its_bounds():
    np.testing.assert_allclose(adaptive_entropy(0.1, 0.19, 0.2, 0.02), 0.12, rtol=1e-6)
    np.testing.assert_allclose(adaptive_entropy(0.1, 0.2, 0.2, 0.02), 0.12, rtol=1e-6)
    np.testing.assert_allclose(adaptive_entropy(0.1, 0.21, 0.2, 0.02), 0.08, rtol=1e-6)
    np.testing.assert_allclose(adaptive_entropy(0.1, 0.21, 0.2, 0.2), 0.0, atol=1e-7)
    np.testing.assert_allclose(adaptive_entropy(0.1, 0.0, 0.2, 0.2, high=0.25), 0.25, rtol=1e-6)
    assert [float(applied_entropy_coefficient(0.5, h, 0.2)) for h in (0.1, 0.2, 0.3)] == [0.5, 0.5, 0.0]


def test_where_nothing_was_measured_coefficients_stay():
    assert adaptive_kl(0.25, np.nan, target=6.0, horizon=10, samples=500) == 0.25
    assert controllers.ppo_penalty_coefficient(0.25, np.nan, 0.01) == 0.25
    assert adaptive_entropy(0.25, np.nan, 0.2) == 0.25


def test_a_fixed_coefficient_stays():
    assert controllers.fixed_coefficient(0.3, 99.0) == 0.3


@pytest.mark.parametrize(
    ("controller", "more"),
    [
        (adaptive_kl, (6.0, 100, 10)),
        (controllers.ppo_penalty_coefficient, (0.01,)),
        (adaptive_entropy, (0.2,)),
        (applied_entropy_coefficient, (0.2,)),
    ],
)
def test_scalars_may_be_traced_and_keep_their_width(controller, more):
    traces = []

    @jax.jit
    def step(coefficient, measured):
        traces.append(1)
        return controller(coefficient, measured, *more)

    coefficient = jnp.float32(0.25)
    for measured in (0.0, 0.01, 7.0):
        want = controller(0.25, measured, *more)
        np.testing.assert_allclose(step(coefficient, jnp.float32(measured)), want, rtol=1e-6)
    assert len(traces) == 1
    assert step(coefficient, jnp.float32(0)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert step(jnp.float64(0.25), jnp.float64(0.01)).dtype == jnp.float64
