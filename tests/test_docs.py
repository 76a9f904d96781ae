"""The algorithm that docs/add_an_algorithm.md adds: its code runs, obeys the laws, and is what the page says it is."""

import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import test_laws
from rljax.types import Trajectory

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add_an_algorithm.md"
LAWS = [
    test_laws.test_micro_batches_change_neither_gradient_nor_metrics,
    test_laws.test_what_stands_at_masked_columns_changes_nothing,
    test_laws.test_row_order_and_the_names_of_groups_do_not_matter,
    test_laws.test_packed_rows_give_the_same_gradient,
    test_laws.test_without_advantage_the_policy_does_not_move,
]


@pytest.fixture(scope="module")
def median_grpo():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code.count("\n") <= 30
    module = types.ModuleType("median_grpo")
    exec(code, module.__dict__)
    return module.median_grpo


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_obeys_the_laws(median_grpo, law, monkeypatch):
    monkeypatch.setitem(test_laws.ALGORITHMS, "median_grpo", median_grpo())
    law("median_grpo")


def test_its_baseline_is_the_median(median_grpo):
    rewards = np.array([0.0, 1.0, 5.0, 2.0, 7.0, np.nan])
    group = np.array([0, 0, 0, 1, 1, 1])
    mask = jnp.ones((6, 1), bool)
    traj = Trajectory(inputs=mask, actions=mask, logp=jnp.zeros((6, 1)), mask=mask, group=jnp.asarray(group))
    batch = median_grpo().credit(traj.replace(rewards=jnp.asarray(rewards)[:, None]), {})
    want = [rewards[i] - np.nanmedian(rewards[group == group[i]]) for i in range(5)]
    np.testing.assert_allclose(batch.advantages[:5, 0], want, rtol=1e-6)
    assert not batch.mask[5].any()
