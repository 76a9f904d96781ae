import math

import numpy as np
import pytest

from rljax.train.alarms import RULES, AlarmRule, check_alarms, describe_rule, exceeds


def rule(test, limit=0.5, metric="x"):
    return AlarmRule("title", metric, test, limit, "meaning")


@pytest.mark.parametrize(
    ("test", "values", "held"),
    [
        ("above", [0.5, 0.6, None, 0.4], [1]),
        ("below", [0.5, 0.6, None, 0.4], [3]),
        ("not_finite", [0.5, None, 0.4], [1]),
        ("below_start", [2.0] * 5 + [1.0, 1.01, 0.99] + [2.0] * 2, [7]),
        ("below_start", [2.0] * 5 + [0.0] * 4, []),  # too few to say where it started
        ("above_median", [1.0] * 9 + [9.0, 0.51, None, 0.5], [10]),
    ],
)
def test_when_a_rule_holds(test, values, held):
    assert np.flatnonzero(exceeds(rule(test), values)).tolist() == held


def test_what_is_said_of_a_rule_that_holds():
    steps = [0, 10, 20, 30]
    (found,) = check_alarms({"x": (steps, [0.6, 0.9, 0.7, 0.1])}, [rule("above")])
    assert found == {
        "title": "title",
        "metric": "x",
        "meaning": "meaning",
        "rule": "above 0.5",
        "logged": True,
        "count": 3,
        "total": 4,
        "now": False,
        "first": 0,
        "last": 20,
        "worst": 0.9,
        "worst_step": 10,
    }
    (found,) = check_alarms({"x": (steps, [0.6, 0.4, 0.1, 0.3])}, [rule("below")])
    assert (found["now"], found["worst"], found["worst_step"]) == (True, 0.1, 20)
    (found,) = check_alarms({"x": (steps, [0.6, None, 0.1, 0.3])}, [rule("not_finite")])
    assert (found["count"], found["worst"], found["worst_step"]) == (1, None, 10)


def test_what_holds_now_comes_first_and_what_was_not_logged_last():
    rules = [rule("above", 0.5, name) for name in ("absent", "never", "before", "now")]
    columns = {name: ([0, 1], values) for name, values in {"never": [0, 0], "before": [1, 0], "now": [0, 1]}.items()}
    found = check_alarms(columns, rules)
    assert [each["metric"] for each in found] == ["now", "before", "never", "absent"]
    assert [each["logged"] for each in found] == [True, True, True, False]


def test_a_healthy_run_raises_none_and_a_sick_one_raises_each():
    steps = list(range(40))
    healthy = {
        "kl_behavior": 0.01,
        "kl": 0.1,
        "clip_fraction": 0.1,
        "ess_fraction": 0.95,
        "entropy": 1.0,
        "frac_reward_zero_std": 0.4,
        "frac_reward_failed": 0.0,
        "reward": 0.3,
        "truncated": 0.1,
        "frac_empty": 0.0,
        "sampler_gap": 1e-5,
        "sampler_kl_k3": 1e-6,
        "grad_norm": 1.0,
        "explained_variance": 0.5,
    }
    sick = {
        "kl_behavior": 1.0,
        "kl": 5.0,
        "clip_fraction": 0.9,
        "ess_fraction": 0.1,
        "entropy": 0.01,
        "frac_reward_zero_std": 1.0,
        "frac_reward_failed": 0.5,
        "reward": None,
        "truncated": 0.9,
        "frac_empty": 0.5,
        "sampler_gap": 2.0,
        "sampler_kl_k3": 0.5,
        "grad_norm": 100.0,
        "explained_variance": -1.0,
    }
    assert {each.metric for each in RULES} == healthy.keys() == sick.keys()
    before = {name: (steps, [value] * 40) for name, value in healthy.items()}
    assert not [found for found in check_alarms(before) if found["count"]]
    after = {name: (steps, [healthy[name]] * 39 + [value]) for name, value in sick.items()}
    found = check_alarms(after)
    assert all(each["now"] and each["count"] == 1 and each["first"] == 39 for each in found)


def test_rewards_that_nothing_is_compared_with_are_no_lack_of_signal():
    """PPO with one completion a prompt."""
    alone = {"frac_reward_zero_std": ([0, 1], [None, None]), "entropy": ([0, 1], [None, None])}
    assert not [found for found in check_alarms(alone) if found["count"]]


def test_thresholds_are_described_with_their_numbers():
    assert len({(each.title, each.metric) for each in RULES}) == len(RULES)
    for each in RULES:
        assert each.test == "not_finite" or f"{each.limit:g}" in describe_rule(each)
        assert math.isfinite(each.limit)
