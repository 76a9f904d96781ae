"""Rankings by enumeration. Peers' numbers: tests/golden/preferences.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import ranking as module
from tests.ops.lifted import Lifted, close, float64  # noqa: F401 (the fixture)

ranking = Lifted(module)
SCORES = np.random.default_rng(0).normal(scale=2.0, size=(3, 4))
ALL = np.ones((3, 4), bool)
SOME = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], bool)


def order_probability(scores):
    """Draw the best, then the best of the rest, and so on, each by its softmax."""
    weights = list(np.exp(scores))
    return np.prod([weights[k] / sum(weights[k:]) for k in range(len(weights))])


def test_plackett_luce_is_minus_the_log_probability_of_the_order():
    for valid in (ALL, SOME):
        want = [-np.log(order_probability(row[here])) for row, here in zip(SCORES, valid, strict=True)]
        close(ranking.plackett_luce(jnp.asarray(SCORES), valid), want)


def test_the_probabilities_of_all_orders_sum_to_one():
    orders = np.array(list(itertools.permutations(SCORES[0])))
    close(np.exp(-ranking.plackett_luce(jnp.asarray(orders), np.ones(orders.shape, bool))).sum(), 1.0)


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.kwise])
def test_two_candidates_are_bradley_terry(loss):
    close(loss(jnp.asarray(SCORES[:, :2]), ALL[:, :2]), ranking.bradley_terry(SCORES[:, 0], SCORES[:, 1]))


def test_kwise_is_the_mean_over_pairs_of_one_prompt():
    for valid in (ALL, SOME):
        for row, here, got in zip(SCORES, valid, ranking.kwise(jnp.asarray(SCORES), valid), strict=True):
            pairs = [np.log1p(np.exp(worse - better)) for better, worse in itertools.combinations(row[here], 2)]
            close(got, np.mean(pairs) if pairs else 0.0)


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.kwise])
@pytest.mark.parametrize("garbage", [np.nan, 1e30, -1e30])
def test_absent_candidates_change_neither_value_nor_gradient(loss, garbage):
    def value_and_gradient(scores):
        return jax.value_and_grad(lambda x: loss(x, SOME).sum())(jnp.asarray(scores))

    clean, spoilt = value_and_gradient(SCORES), value_and_gradient(np.where(SOME, SCORES, garbage))
    jax.tree.map(close, spoilt, clean)
    assert np.abs(clean[1][SOME][:5]).min() > 1e-3  # the last row has one candidate: nothing to learn
    assert not np.any(clean[1][~SOME])


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.kwise])
def test_scores_are_known_up_to_a_constant(loss):
    close(loss(jnp.asarray(SCORES + 17.0), ALL), loss(jnp.asarray(SCORES), ALL))


def test_centring_alone_pins_the_constant():
    close(ranking.center_rewards_penalty(np.array([1.0, 2.0]), np.array([-1.0, 1.0])), [0.0, 9.0])


def test_step_cross_entropy_with_soft_labels():
    label, p = np.array([0.0, 0.25, 1.0]), 1 / (1 + np.exp(-SCORES[0, :3]))
    close(ranking.step_cross_entropy(SCORES[0, :3], label), -label * np.log(p) - (1 - label) * np.log(1 - p))
    close(jax.vmap(jax.grad(ranking.step_cross_entropy))(jnp.asarray(SCORES[0, :3]), label), p - label)


def test_an_answers_score_from_its_steps():
    p = np.array([[0.9, 0.5, 0.8, np.nan], [np.nan, 0.7, np.nan, 0.2], [np.nan] * 4])
    valid = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    close(ranking.min_over_steps(p, valid), [0.5, 0.2, 1.0])
    close(ranking.product_over_steps(p, valid), [0.36, 0.14, 1.0])
    close(ranking.last_step(p, valid), [0.8, 0.2, 1.0])
