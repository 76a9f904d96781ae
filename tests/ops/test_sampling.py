"""Sampling against naive numpy: sorted filters, the inverse of an exact cumulative distribution, chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import sampling
from rljax.ops.sampling import argmax
from tests import bounds
from tests.ops.golden import narrow

# Jitted: op by op they take longer to compile than to test.
invert_cdf, truncate = jax.jit(sampling.invert_cdf, static_argnames="block"), jax.jit(sampling.truncate)
truncate_to = jax.jit(sampling.truncate_to, static_argnames="k")
row_keys, token_uniforms = jax.jit(sampling.row_keys), jax.jit(sampling.token_uniforms)
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def dyadic(rows, V, seed=0, top=6):
    """Small whole numbers over 1024: every sum of them is exact in float32, and ties abound."""
    counts = np.random.default_rng(seed).integers(0, top, size=(rows, V))
    counts[:, 3] = top
    return counts / 1024.0


def truncate_by_sorting(p, top_k=None, top_p=None, min_p=None):
    """One row, float64. Whatever ties with the last token kept is kept."""
    kept = p.copy()
    if top_k is not None:
        kept[kept < np.sort(p)[::-1][min(top_k, len(p)) - 1]] = 0
    if top_p is not None and top_p < 1:
        likely = np.sort(kept)[::-1]
        fewest = np.flatnonzero(np.cumsum(likely) >= top_p * kept.sum())[0]
        kept[kept < likely[fewest]] = 0
    if min_p is not None:
        kept[kept < min_p * p.max()] = 0
    return kept


K, P, M = [1, 3, 8, 17, 40, 1000], [0.125, 0.5, 0.75, 0.875, 1.0, 0.0625], [0.5, 0.25, 1.0, 0.125, 0.0, 0.75]


@pytest.mark.parametrize(
    "filters",
    [{"top_k": K}, {"top_p": P}, {"min_p": M}, {"top_k": K, "top_p": P}, {"top_k": K, "top_p": P, "min_p": M}],
    ids="+".join,
)
@pytest.mark.parametrize("V", [40, 200, 1187])
def test_truncate_keeps_what_a_sort_keeps_row_by_row(filters, V):
    probs = dyadic(len(K), V)
    want = [truncate_by_sorting(row, **{k: v[i] for k, v in filters.items()}) for i, row in enumerate(probs)]
    arrays = {name: jnp.asarray(values) for name, values in filters.items()}
    got = np.asarray(truncate(narrow(probs), **arrays))
    np.testing.assert_array_equal(got, want)
    assert (got == 0).sum() > (probs == 0).sum()


@pytest.mark.parametrize("k", [1, 7, 40])
def test_truncating_to_k_keeps_the_first_of_what_truncate_keeps(k):
    """Most likely first, of tied tokens the first; where fewer are kept no token."""
    probs = dyadic(len(K), 200)
    every = {"top_k": np.minimum(K, k), "top_p": np.array(P), "min_p": np.array(M)}
    for names in (("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), tuple(every)):
        rows = [{name: every[name][i] for name in names} for i in range(len(K))]
        whole = np.array([truncate_by_sorting(row, **cuts) for row, cuts in zip(probs, rows, strict=True)])
        ids = np.argsort(-whole, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(whole, ids, axis=1)
        got = truncate_to(narrow(probs), k, **{name: jnp.asarray(every[name]) for name in names})
        np.testing.assert_array_equal(got[0], kept)
        np.testing.assert_array_equal(got[1], np.where(kept > 0, ids, -1))


def test_more_passes_a_turn_find_the_same_thresholds(monkeypatch):
    probs = np.random.default_rng(6).dirichlet(np.full(3000, 0.2), size=12).astype(np.float32)
    cuts = jnp.arange(1, 360, 30), jnp.linspace(0.05, 0.999, 12), jnp.full(12, 1e-4)
    once = truncate(probs, *cuts)
    monkeypatch.setattr(sampling, "PASSES_A_TURN", {})
    assert sampling.PASSES_ELSEWHERE > 1
    np.testing.assert_array_equal(jax.jit(lambda *args: sampling.truncate(*args))(probs, *cuts), once)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_filters_that_are_off_change_nothing(filters):
    probs = narrow(np.random.default_rng(0).dirichlet(np.ones(50), size=4))
    arrays = {name: jnp.full(4, value) for name, value in filters.items()}
    np.testing.assert_array_equal(truncate(probs, **arrays), probs)


@pytest.mark.parametrize("p", [1e-30, 1e-3, 0.25, 0.7])
def test_the_threshold_tells_neighbouring_floats_apart(p):
    ladder = [np.float32(p)]
    for _ in range(6):
        ladder.append(np.nextafter(ladder[-1], np.float32(1)))
    kept = truncate(jnp.asarray([ladder]), top_k=jnp.array([3]))
    np.testing.assert_array_equal(kept, [[0, 0, 0, 0, *ladder[4:]]])


def test_top_p_of_any_probabilities_is_the_smallest_set_that_holds_the_share():
    probs = np.random.default_rng(1).dirichlet(np.full(100, 0.3), size=200).astype(np.float32)
    share = np.linspace(0.01, 0.99, 200, dtype=np.float32)
    kept = np.asarray(truncate(jnp.asarray(probs), top_p=jnp.asarray(share)), np.float64)
    rounding = bounds.of_sum(probs.shape[1])
    assert (kept.sum(1) >= share - rounding).all()
    least = np.where(kept > 0, kept, np.inf).min(1)
    assert (kept.sum(1) - least < share + rounding).all()
    assert np.array_equal(kept > 0, probs >= least[:, None])


@pytest.mark.parametrize("block", [7, 128, 300, 512])
def test_every_uniform_inverts_an_exact_distribution_boundaries_included(block):
    counts = np.random.default_rng(2).multinomial(1024, np.random.default_rng(3).dirichlet(np.full(300, 0.05)))
    assert (counts == 0).sum() > 100
    steps = np.arange(1024)
    probs = np.broadcast_to(counts / 1024, (1024, 300))
    want = np.searchsorted(np.cumsum(counts), steps, side="right")
    for inside in (0, 0.5, 0.9):
        got = invert_cdf(narrow(probs), narrow((steps + inside) / 1024), block)
        np.testing.assert_array_equal(got, want)
    # It need not sum to one: twice the mass, the same tokens.
    np.testing.assert_array_equal(invert_cdf(narrow(2 * probs), narrow(steps / 1024), block), want)


@pytest.mark.parametrize("V", [1, 5, 128, 129, 1000])
def test_the_extreme_uniforms_draw_the_first_and_the_last_token_that_can_be_drawn(V):
    probs = np.random.default_rng(V).random((6, V)) * (np.random.default_rng(V + 1).random((6, V)) < 0.4)
    probs[:, V // 2] = 0.25
    first, last = (probs > 0).argmax(1), V - 1 - (probs > 0)[:, ::-1].argmax(1)
    np.testing.assert_array_equal(invert_cdf(narrow(probs), jnp.zeros(6)), first)
    np.testing.assert_array_equal(invert_cdf(narrow(probs), jnp.full(6, BELOW_ONE)), last)


@pytest.mark.parametrize("block", [1, 32, 1000])
def test_a_token_without_probability_is_never_drawn_even_where_rounding_moves_the_cdf(block):
    """A cumsum of 1000 numbers that adds blocks may rise at zeros: aim at such places, an ulp to either side.

    XLA's own where it has some, which hangs on the kernel; and those of a cumsum by blocks of 16.
    """
    draw = np.random.default_rng(0)
    probs = (draw.random((300, 1000)) * (draw.random((300, 1000)) < 0.3)).astype(np.float32)
    blocks = np.pad(probs, ((0, 0), (0, 8))).reshape(300, 63, 16)
    before = np.cumsum(blocks.sum(axis=2), axis=1, dtype=np.float32) - blocks.sum(axis=2)
    ours = (before[:, :, None] + np.cumsum(blocks, axis=2)).reshape(300, -1)[:, :1000]
    cdf = np.concatenate([np.asarray(jnp.cumsum(jnp.asarray(probs), axis=1)), ours])
    probs = np.concatenate([probs, probs])
    row, place = np.nonzero((probs[:, 1:] == 0) & (np.diff(cdf, axis=1) > 0))
    assert len(row) > 100
    aim = (cdf[row, place] / cdf[row, -1]).astype(np.float32)
    for uniform in (aim, np.nextafter(aim, np.float32(0)), np.nextafter(aim, np.float32(1))):
        uniform = np.minimum(uniform, BELOW_ONE)
        tokens = np.asarray(invert_cdf(jnp.asarray(probs[row]), jnp.asarray(uniform), block))
        assert (probs[row, tokens] > 0).all()
        exact = np.cumsum(probs[row].astype(np.float64), axis=1)
        low, high = exact[np.arange(len(row)), tokens - 1] * (tokens > 0), exact[np.arange(len(row)), tokens]
        target = uniform * exact[:, -1]
        assert ((low - 1e-3 <= target) & (target <= high + 1e-3)).all()


def test_draws_follow_the_probabilities():
    """χ² of 20,000 tokens: 99.9 % of right samplers stay below 85.4 (49 degrees of freedom)."""
    n, probs = 20_000, np.random.default_rng(4).dirichlet(np.ones(50))
    numbers = jnp.arange(n, dtype=jnp.int32)
    uniform = token_uniforms(row_keys(jnp.int32(0), jnp.int32(7), numbers // 8, numbers % 8), jnp.int32(3))
    tokens = invert_cdf(jnp.broadcast_to(narrow(probs), (n, 50)), uniform, block=16)
    seen = np.bincount(tokens, minlength=50)
    assert ((seen - n * probs) ** 2 / (n * probs)).sum() < 85.4


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 130), (7, 1)])
def test_argmax_is_the_first_of_ties(shape):
    x = np.random.default_rng(0).integers(-3, 2, size=shape).astype(np.float32)
    x[..., -1] = -np.inf if shape[-1] > 1 else -1
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(-1))
    x[..., 0] = np.nan
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), shape[-1] - 1)  # inside


def test_a_uniform_depends_on_its_own_coordinates_alone():
    seed, step, number = jnp.int32(1), jnp.int32(2), jnp.arange(12, dtype=jnp.int32)
    prompt, sample = number // 4, number % 4
    whole = np.asarray(token_uniforms(row_keys(seed, step, prompt, sample), jnp.int32(5)))
    for rows in ([3], [7, 2, 11], [0, 1, 2, 3, 4, 5]):
        part = token_uniforms(row_keys(seed, step, prompt[jnp.array(rows)], sample[jnp.array(rows)]), jnp.int32(5))
        np.testing.assert_array_equal(part, whole[rows])


def test_every_coordinate_changes_the_uniform():
    grid = [(s, t, p, g, i) for s in (0, 1) for t in (0, 1) for p in (0, 1, 9) for g in (0, 1, 2) for i in (0, 1, 5)]
    seen = []
    for seed, step, prompt, sample, position in grid:
        keys = row_keys(*(jnp.int32(x) for x in (seed, step)), jnp.array([prompt]), jnp.array([sample]))
        seen.append(float(token_uniforms(keys, jnp.int32(position))[0]))
    assert len(set(seen)) == len(grid)
    assert min(seen) >= 0
    assert max(seen) < 1
