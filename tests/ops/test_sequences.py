"""Sums over sequences against loops over the columns of each."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import sequences

B, T = 4, 9
draw = np.random.default_rng(0)
MASK = draw.random((B, T)) < 0.6
MASK[1] = False
SEGMENTS = np.sort(draw.integers(1, 4, (B, T)), axis=1)
X = draw.normal(size=(B, T)) - 2.0  # below 0: a maximum must not see the zeros of masked columns
OURS = {
    "sum": (sequences.sequence_sum, np.sum),
    "mean": (sequences.sequence_mean, np.mean),
    "max": (sequences.sequence_max, np.max),
}


def by_loops(statistic, segments):
    out = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        own = MASK[b] & (segments[b] == segments[b, t])
        out[b, t] = statistic(X[b, own]) if own.any() else 0.0
    return out


LARGE = np.array([0, 2**31 - 1, -5, 1001])[SEGMENTS]  # wider than the row, negative, in no order


@pytest.mark.parametrize("packed", [SEGMENTS, LARGE, None], ids=["small ids", "any ids", "rows"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("garbage", [0.0, 1e30, np.nan])
def test_every_column_is_given_what_its_sequence_says_whatever_stands_at_masked_ones(name, packed, garbage):
    ours, statistic = OURS[name]
    segments = None if packed is None else jnp.asarray(packed)
    x = jnp.asarray(np.where(MASK, X, garbage), jnp.float32)

    def total(x):
        out = ours(x, jnp.asarray(MASK), segments)
        return (out * jnp.asarray(MASK)).sum(), out

    gradient, got = jax.grad(total, has_aux=True)(x)
    want = by_loops(statistic, np.ones((B, T), int) if packed is None else packed)
    np.testing.assert_allclose(np.where(MASK, got, want), want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(np.where(MASK, 0.0, gradient), 0.0)
    assert np.asarray(gradient)[MASK].sum() == pytest.approx(count(name, packed is not None), rel=1e-5)


def count(name, packed):
    """Σ over the terms of d(Σ of the results)/d(a term): n² for a sum of n terms, n for a mean or a maximum."""
    ids = SEGMENTS if packed else np.ones((B, T), int)
    sizes = [(MASK[b] & (ids[b] == number)).sum() for b in range(B) for number in np.unique(ids[b])]
    return float(sum(n**2 if name == "sum" else n for n in sizes))


@pytest.mark.parametrize("name", OURS)
def test_segments_in_the_place_of_a_mask_are_refused(name):
    """As a function of `ops.weights` is called: (mask, segments)."""
    segments = jnp.asarray(SEGMENTS, jnp.int32)
    with pytest.raises(TypeError):
        OURS[name][0](jnp.asarray(MASK), segments)
    if name != "mean":  # which calls the sum; and without the check of types that tests have
        with pytest.raises(TypeError, match="mask must be bool, not int32"):
            inspect.unwrap(OURS[name][0])(jnp.asarray(MASK), segments)
