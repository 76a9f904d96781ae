"""Ratios of policies and the weights made of them. The peers' numbers are in tests/golden/losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import ratios


@pytest.mark.parametrize("gap", [-300.0, -60.0, 60.0, 300.0])
def test_far_apart_the_ratio_stops_at_e_to_the_20_without_gradient(gap):
    value, slope = jax.value_and_grad(ratios.importance_ratio)(jnp.float32(gap), jnp.float32(0.0))
    np.testing.assert_allclose(value, np.exp(np.sign(gap) * 20.0), rtol=1e-6)
    assert slope == 0


def test_a_ratio_is_that_of_the_probabilities_and_its_own_gradient():
    new, old = np.array([0.3, 0.9, 0.001]), np.array([0.6, 0.01, 0.5])
    logp, old_logp = jnp.log(jnp.float32(new)), jnp.log(jnp.float32(old))
    np.testing.assert_allclose(ratios.importance_ratio(logp, old_logp), new / old, rtol=1e-5)
    slope = jax.grad(lambda x: ratios.importance_ratio(x, old_logp).sum())(logp)
    np.testing.assert_allclose(slope, new / old, rtol=1e-5)


def test_levels_are_of_the_decision_of_the_answer_and_per_decision_of_the_answer():
    mask = jnp.array([[True, False, True, True], [False, True, False, False]])
    log_ratio = jnp.array([[0.1, jnp.nan, -0.4, 0.6], [7.0, 0.2, jnp.inf, 1.0]])
    first, second = 0.1 - 0.4 + 0.6, 0.2
    want = {
        ratios.token_level: [[0.1, 0.0, -0.4, 0.6], [0.0, 0.2, 0.0, 0.0]],
        ratios.sequence_product: [[first] * 4, [second] * 4],
        ratios.sequence_geometric_mean: [[first / 3] * 4, [second] * 4],
    }
    for level, values in want.items():
        np.testing.assert_allclose(level(log_ratio, mask), values, rtol=1e-5, atol=1e-7)


def test_weights_are_cut_left_out_or_made_to_average_one():
    weights = jnp.array([[0.2, 0.5, 1.0], [2.0, 5.0, 9.0]])
    np.testing.assert_array_equal(ratios.truncate_weights(weights, 2.0), jnp.array([[0.2, 0.5, 1.0], [2.0, 2.0, 2.0]]))
    np.testing.assert_array_equal(ratios.mask_weights(weights, 0.5, 5.0), jnp.array([[0.0, 0.5, 1.0], [2.0, 5.0, 0.0]]))
    share = jnp.array([[0.5, 0.0, 0.25], [0.25, 0.0, 0.0]])
    np.testing.assert_allclose(ratios.normalize_weights(weights, share), np.asarray(weights) / 0.85, rtol=1e-6)
    np.testing.assert_allclose(ratios.normalize_weights(weights, 12.0 * share), np.asarray(weights) / 0.85, rtol=1e-6)
