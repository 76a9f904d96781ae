"""Agreement of annotators against textbook tables."""

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops.agreement import cohen_kappa, fleiss_kappa, raw_agreement


def labels_of(table):
    """[N A] from how many annotators gave each item (row) each category (column)."""
    return jnp.array([np.repeat(np.arange(len(row)), row) for row in table])


def pairs_of(table):
    """[N 2] from how many items the two annotators gave each pair of categories."""
    return jnp.array([(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)])


# 10 items, 14 annotators, 5 categories: the worked example of Fleiss' kappa on Wikipedia, κ = 0.210.
FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def test_fleiss_kappa_of_the_worked_example():
    labels = labels_of(FLEISS)
    np.testing.assert_allclose(fleiss_kappa(labels, 5), 0.210, atol=5e-4)
    np.testing.assert_allclose(raw_agreement(labels, 5), 0.378, atol=5e-4)


@pytest.mark.parametrize(
    ("table", "observed", "kappa"),
    [
        ([[20, 5], [10, 15]], 0.70, 0.40),  # the worked example of Cohen's kappa on Wikipedia
        ([[45, 15], [25, 15]], 0.60, 0.1304),  # and its two tables of equal agreement
        ([[25, 35], [5, 35]], 0.60, 0.2593),
        ([[3, 0], [0, 2]], 1.0, 1.0),
    ],
)
def test_cohen_kappa_of_worked_examples(table, observed, kappa):
    labels = pairs_of(table)
    np.testing.assert_allclose(raw_agreement(labels, 2), observed, atol=1e-6)
    np.testing.assert_allclose(cohen_kappa(labels, 2), kappa, atol=5e-5)


def test_one_category_says_nothing_about_agreement_beyond_chance():
    labels = jnp.zeros((4, 2), int)
    assert np.isnan(cohen_kappa(labels, 2))
    assert np.isnan(fleiss_kappa(labels, 2))
    assert raw_agreement(labels, 2) == 1


def test_kappa_does_not_depend_on_names_of_categories_or_order_of_annotators():
    labels = jnp.array(np.random.default_rng(0).integers(0, 3, (40, 4)))
    wanted = fleiss_kappa(labels, 3)
    renamed = jnp.array([2, 0, 1])[labels]
    np.testing.assert_allclose(fleiss_kappa(renamed[:, ::-1], 3), wanted, atol=1e-6)
