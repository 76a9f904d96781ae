"""What a reader of a run should look at: metrics beyond a threshold, with the threshold.

    above, below       the value itself is compared with the limit
    above_median       with the limit times the median of the 50 values before it
    below_start        with the limit times the mean of the first values logged
    not_finite         the value is missing: it was NaN or infinite

The thresholds are rules of thumb. They say where to look; they stop nothing and change nothing.
"""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

BEFORE = 50  # values whose median is compared with
START = 5  # values whose mean is the start; of fewer than twice as many there is no start to compare with
MetricColumn = tuple[Sequence[int], Sequence[float | None]]  # the steps of a metric, and its values: None if not finite


class AlarmRule(NamedTuple):
    """When a metric is worth a look. `meaning` is what it then says, for a reader of the report."""

    title: str
    metric: str
    test: Literal["above", "below", "above_median", "below_start", "not_finite"]
    limit: float
    meaning: str


RULES = (
    AlarmRule(
        "Large policy steps",
        "kl_behavior",
        "above",
        0.1,
        "nats a decision between the policy that sampled and this one",
    ),
    AlarmRule("Far from the reference", "kl", "above", 1.0, "nats a decision; the KL coefficient may be too small"),
    AlarmRule(
        "Much is clipped", "clip_fraction", "above", 0.3, "of the decisions have no gradient; smaller steps help"
    ),
    AlarmRule("Few effective samples", "ess_fraction", "below", 0.5, "of the decisions carry the update's weight"),
    AlarmRule("Entropy collapse", "entropy", "below_start", 0.1, "the policy writes nearly the same at every draw"),
    AlarmRule(
        "No signal",
        "frac_reward_zero_std",
        "above",
        0.9,
        "of the rows have groups of one reward, whose advantages are 0",
    ),
    AlarmRule("Rewards fail", "frac_reward_failed", "above", 0.05, "of the rows have no reward: a verifier failed"),
    AlarmRule("No reward at all", "reward", "not_finite", 0.0, "no row of the step was scored"),
    AlarmRule("Completions are cut", "truncated", "above", 0.25, "of the completions reach the length limit"),
    AlarmRule("Empty completions", "frac_empty", "above", 0.05, "of the completions have no token"),
    AlarmRule(
        "Sampler and trainer differ",
        "sampler_gap",
        "above",
        0.5,
        "nats, the largest difference of one token's log-prob",
    ),
    AlarmRule("Sampler drifts from trainer", "sampler_kl_k3", "above", 0.01, "nats a decision, KL(sampler ‖ trainer)"),
    AlarmRule("Gradient spikes", "grad_norm", "above_median", 10.0, "clipping holds the step, the direction is noise"),
    AlarmRule("Useless critic", "explained_variance", "below", 0.0, "a constant would predict returns better"),
)


def check_alarms(columns: Mapping[str, MetricColumn], rules: Sequence[AlarmRule] = RULES) -> list[dict[str, Any]]:
    """Each rule with what the logged values say of it, those that hold now first, then those that held, the rest after.

    Returns dicts: title, metric, meaning, rule ("above 0.1"), logged (False: the run has no such metric), and of the
    steps where it holds their number `count`, the `first` and the `last`, the `worst` value and its step `worst_step`;
    `total` steps were looked at, and `now` says whether it holds at the last of them.
    """
    checked = [_check(rule, columns.get(rule.metric)) for rule in rules]
    return sorted(checked, key=lambda found: (not found["now"], not found["count"], not found["logged"]))


def _check(rule: AlarmRule, column: MetricColumn | None) -> dict[str, Any]:
    found = {"title": rule.title, "metric": rule.metric, "meaning": rule.meaning, "rule": describe_rule(rule)}
    if column is None:
        return {**found, "logged": False, "total": 0, "count": 0, "now": False}
    steps, values = column
    held = [i for i, holds in enumerate(exceeds(rule, values)) if holds]
    found |= {
        "logged": True,
        "total": len(values),
        "count": len(held),
        "now": bool(held) and held[-1] == len(values) - 1,
    }
    if held:
        worst = _worst(rule, values, held)
        found |= {"first": steps[held[0]], "last": steps[held[-1]], "worst": values[worst], "worst_step": steps[worst]}
    return found


def exceeds(rule: AlarmRule, values: Sequence[float | None]) -> list[bool]:
    """Whether the rule holds, for each value."""
    if rule.test == "not_finite":
        return [value is None for value in values]
    if rule.test == "above_median":
        return _above_median(values, rule.limit)
    limit = rule.limit
    if rule.test == "below_start":
        known = [value for value in values if value is not None]
        if len(known) < 2 * START:
            return [False] * len(values)
        limit *= statistics.fmean(known[:START])
    if rule.test == "above":
        return [value is not None and value > limit for value in values]
    return [value is not None and value < limit for value in values]


def _above_median(values: Sequence[float | None], factor: float) -> list[bool]:
    """Whether each value is above `factor` times the median of those before it, of which there must be enough."""
    before: deque[float] = deque(maxlen=BEFORE)
    held = []
    for value in values:
        enough = len(before) >= 2 * START
        held.append(enough and value is not None and value > factor * statistics.median(before))
        if value is not None:
            before.append(value)
    return held


def _worst(rule: AlarmRule, values: Sequence[float | None], held: Sequence[int]) -> int:
    if rule.test == "not_finite":
        return held[-1]
    pick = max if rule.test.startswith("above") else min
    return pick(held, key=lambda i: values[i])


def describe_rule(rule: AlarmRule) -> str:
    """The threshold in words.

    >>> describe_rule(RULES[0]), describe_rule(RULES[4])
    ('above 0.1', 'below 0.1 times its start')
    """
    words = {
        "above": f"above {rule.limit:g}",
        "below": f"below {rule.limit:g}",
        "above_median": f"above {rule.limit:g} times its median so far",
        "below_start": f"below {rule.limit:g} times its start",
        "not_finite": "not finite",
    }
    return words[rule.test]
