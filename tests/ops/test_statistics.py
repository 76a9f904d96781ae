"""Masked statistics against numpy on the unmasked entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops.statistics import (
    explained_variance,
    masked_max,
    masked_mean,
    masked_min,
    masked_std,
    masked_var,
    nan_where_none,
    whiten,
)

draw = np.random.default_rng(0)
MASK = draw.random((5, 7)) < 0.6
X = np.where(MASK, draw.normal(size=(5, 7)) * 3 + 2, np.nan)


def close(got, want, atol=2e-6):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=atol)


def narrow(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(
    ("ours", "numpys"),
    [
        (masked_mean, np.mean),
        (masked_var, lambda x: x.var(ddof=1)),
        (masked_std, lambda x: x.std(ddof=1)),
        (masked_max, np.max),
        (masked_min, np.min),
    ],
)
def test_statistics_are_those_of_the_unmasked(ours, numpys):
    for sign in (1, -1):
        close(ours(narrow(sign * X), jnp.asarray(MASK)), numpys(sign * X[MASK]))
        close(ours(narrow(np.where(MASK, sign * X, 1e30)), jnp.asarray(MASK)), numpys(sign * X[MASK]))


def test_whitened_entries_have_mean_0_and_variance_1_and_masked_ones_are_0():
    white = np.asarray(whiten(narrow(X), jnp.asarray(MASK)), np.float64)
    close(white[MASK], (X[MASK] - X[MASK].mean()) / X[MASK].std(ddof=1))
    assert (white[~MASK] == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_entries_give_zeros(count):
    x, mask = jnp.full((2, 3), jnp.nan).at[0, 0].set(4.0), jnp.zeros((2, 3), bool).at[0, 0].set(count > 0)
    for one_is_enough in (masked_mean, masked_max, masked_min):
        close(one_is_enough(x, mask), 4.0 * count)
    assert masked_var(x, mask) == masked_std(x, mask) == 0
    assert (whiten(x, mask) == 0).all()


def test_a_metric_of_nothing_is_no_number_and_no_error_of_debugging():
    with jax.debug_nans(True), jax.disable_jit():
        for value, count, want in ((0.0, 0, np.nan), (0.5, 1, 0.5)):
            np.testing.assert_array_equal(nan_where_none(jnp.float32(value), jnp.int32(count)), np.float32(want))


def test_explained_variance_of_a_perfect_a_constant_and_a_halfway_critic():
    targets, mask = narrow(X), jnp.asarray(MASK)
    close(explained_variance(targets, targets, mask), 1.0)
    close(explained_variance(jnp.ones_like(targets), targets, mask), 0.0, atol=1e-5)
    close(explained_variance(targets / 2, targets, mask), 0.75, atol=1e-5)


@pytest.mark.parametrize("value", [0.3, 5.3, 10.1, -1000.1])
def test_equal_entries_are_whitened_to_zero_to_the_last_bit(value):
    x = jnp.full((7, 13), value, jnp.float32).at[0, 0].set(jnp.nan)
    mask = jnp.ones((7, 13), bool).at[0, 0].set(False)
    assert not whiten(x, mask).any()
