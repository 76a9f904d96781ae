"""Statistics by group against numpy, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import groups
from tests.ops.golden import close, narrow

group_count, group_mean, group_std = (jax.jit(f) for f in (groups.group_count, groups.group_mean, groups.group_std))
group_sum, leave_one_out_mean = jax.jit(groups.group_sum), jax.jit(groups.leave_one_out_mean)

# Any ids in any order: a group of four (one row not judged), a singleton, a pair with one judged, one with none.
GROUP = np.array([7, -2, 7, 40, 7, 40, 3, 7, 3])
VALID = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0], bool)
X = np.array([1.0, 5.0, np.nan, 2.0, -4.0, np.nan, np.nan, 0.5, np.nan])


def by_hand(statistic):
    """statistic(values of the others who were judged, own values who were judged) for each row."""
    rows = range(len(X))
    mates = [[j for j in rows if GROUP[j] == GROUP[i] and VALID[j]] for i in rows]
    return [statistic(X[[j for j in mates[i] if j != i]], X[mates[i]]) for i in rows]


@pytest.mark.parametrize(
    ("ours", "hand"),
    [
        (group_mean, lambda others, own: own.mean() if len(own) else 0.0),
        (group_std, lambda others, own: own.std(ddof=1) if len(own) > 1 else 0.0),
        (leave_one_out_mean, lambda others, own: others.mean() if len(others) else 0.0),
        (jax.jit(groups.group_min), lambda others, own: own.min() if len(own) else 0.0),
        (jax.jit(groups.group_max), lambda others, own: own.max() if len(own) else 0.0),
        (lambda x, group, valid: group_count(group, valid), lambda others, own: len(own)),
    ],
)
def test_statistics_are_those_of_the_judged_rows_with_the_same_id(ours, hand):
    close(ours(narrow(X), jnp.asarray(GROUP), jnp.asarray(VALID)), by_hand(hand))


def test_the_standard_error_of_a_ratio_counts_groups():
    count = np.array([2.0, 1, 0, 3, 1, 0, 0, 1, 0])
    total = np.where(count > 0, np.nan_to_num(X), 0.0)
    ratio = total.sum() / count.sum()
    sums = [(total - ratio * count)[g == GROUP].sum() for g in (7, -2, 40)]  # of group 3 nothing counts
    want = np.sqrt(3 / 2 * np.square(sums).sum()) / count.sum()
    standard_error = jax.jit(groups.standard_error)
    close(standard_error(narrow(total), narrow(count), jnp.asarray(GROUP)), want)
    alone = np.arange(len(X))
    close(standard_error(narrow(total), jnp.ones(9), alone), total.std(ddof=1) / 3)
    assert np.isnan(standard_error(narrow(total), jnp.ones(9), jnp.zeros(9, int)))


def test_group_sum_adds_every_row():
    close(group_sum(jnp.ones(len(X)), jnp.asarray(GROUP)), [np.sum(g == GROUP) for g in GROUP])


@pytest.mark.parametrize("statistic", [group_mean, group_std, leave_one_out_mean])
def test_row_order_does_not_matter(statistic):
    order = np.random.default_rng(0).permutation(len(X))
    straight = statistic(narrow(X), jnp.asarray(GROUP), jnp.asarray(VALID))
    shuffled = statistic(narrow(X[order]), jnp.asarray(GROUP[order]), jnp.asarray(VALID[order]))
    close(shuffled, np.asarray(straight)[order])


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -2.3, 1000.1, 3.3e7])
def test_equal_values_have_exactly_their_value_as_mean(value):
    """Else rounding, divided by a standard deviation of the same rounding, would pass for an advantage."""
    group = jnp.asarray([size for size in (2, 3, 7, 12, 16) for _ in range(size)])
    x, valid = jnp.full(len(group), value, jnp.float32), jnp.ones(len(group), bool)
    np.testing.assert_array_equal(group_mean(x, group, valid), x)
    np.testing.assert_array_equal(leave_one_out_mean(x, group, valid), x)
    np.testing.assert_array_equal(group_std(x, group, valid), 0.0)


def test_no_judged_row_at_all_gives_zeros():
    nobody = jnp.zeros(len(X), bool)
    for statistic in (group_mean, group_std, leave_one_out_mean):
        np.testing.assert_array_equal(statistic(narrow(X), jnp.asarray(GROUP), nobody), 0.0)
