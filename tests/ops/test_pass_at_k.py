"""pass@k against the share of all subsets."""

from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_it_is_the_share_of_subsets_with_a_correct_completion(n):
    for k in range(1, n + 1):
        want = []
        for c in range(n + 1):
            correct = np.arange(n) < c
            want.append(np.mean([correct[list(chosen)].any() for chosen in combinations(range(n), k)]))
        got = pass_at_k(jnp.full(n + 1, n), jnp.arange(n + 1), k)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert (got[n - k + 1 :] == 1).all()


def test_with_fewer_completions_than_k_it_is_known_only_if_one_is_correct():
    np.testing.assert_array_equal(pass_at_k(jnp.array([3, 3, 0]), jnp.array([1, 0, 0]), 4), [1, np.nan, np.nan])
    assert pass_at_k(2, 1, 1) == 0.5
    np.testing.assert_allclose(pass_at_k(10_000, 10, 100), 1 - (0.99) ** 10, rtol=5e-3)
