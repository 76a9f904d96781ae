"""pass@k and the reward of the best of k against all subsets; the KL of best-of-n against a sum over its outcomes."""

from collections import Counter
from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops.pass_at_k import best_of_n_kl, expected_best, majority_at_k, pass_at_k


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


def test_with_fewer_completions_than_k_it_is_not_known_correct_or_not():
    found = pass_at_k(jnp.array([3, 3, 0, 4, 4]), jnp.array([1, 0, 0, 1, 0]), 4)
    np.testing.assert_array_equal(found, [np.nan, np.nan, np.nan, 1, 0])
    assert pass_at_k(2, 1, 1) == 0.5
    np.testing.assert_allclose(pass_at_k(10_000, 10, 100), 1 - (0.99) ** 10, rtol=5e-3)


def test_the_best_of_k_is_the_mean_over_subsets():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    rewards[0, 1] = rewards[0, 3]
    for k in range(1, 6):
        want = [np.mean([max(row[list(chosen)]) for chosen in combinations(range(5), k)]) for row in rewards]
        np.testing.assert_allclose(expected_best(jnp.asarray(rewards), k), want, rtol=1e-5)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"the best of {k} of 5 rewards; legal: 1 to 5"):
            expected_best(jnp.asarray(rewards), k)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_kl_of_best_of_n_is_reached_where_all_outcomes_are_rare(n):
    """Of M equally likely outcomes the i-th best is the best of n with probability (i/M)^n - ((i-1)/M)^n."""

    def exact(outcomes):
        i = np.arange(1, outcomes + 1)
        best = (i / outcomes) ** n - ((i - 1) / outcomes) ** n
        return (best * np.log(best * outcomes)).sum()

    assert exact(4) <= best_of_n_kl(n) + 1e-12
    assert exact(100_000) == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_the_majority_is_what_a_count_of_votes_says():
    """The most frequent answers of each block by a Counter; equally frequent ones share."""
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 3, (20, 7))
    right_answer = rng.integers(0, 3, 20)
    correct = answers == right_answer[:, None]
    for k in range(1, 8):
        want = []
        for row, right in zip(answers.tolist(), right_answer, strict=True):
            shares = []
            for start in range(0, 7 // k * k, k):
                votes = Counter(answer for answer in row[start : start + k] if answer >= 0)
                most = [answer for answer, count in votes.items() if count == max(votes.values())]
                shares.append(most.count(right) / len(most) if most else 0.0)
            want.append(np.mean(shares))
        found = majority_at_k(jnp.asarray(answers), jnp.asarray(correct), k)
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"the majority of {k} of 7 completions; legal: 1 to 7"):
            majority_at_k(jnp.asarray(answers), jnp.asarray(correct), k)
