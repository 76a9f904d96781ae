"""What a rollout shows, by hand on four prompts of two answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.train.metrics import average, describe, require_on_policy, reward_and_kl
from rljax.types import Trajectory

nan = np.nan
MASK = np.array([[0, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 1]], bool)
LAST = np.array([2, 1, 2, 2, 1, 1, 1, 2])
REWARD = np.array([1.0, 0.0, 0.3, 0.3, nan, 0.7, nan, nan])  # groups: unequal, equal, one judged, none judged
SCORES = np.array([[1, 5], [0, nan], [1, 5], [1, 7], [nan, 5], [0, 5], [nan, nan], [nan, 3.0]])


def trajectory(**fields):
    rewards = np.full(MASK.shape, 99.0)  # garbage outside the mask
    rewards[MASK] = 0.0
    rewards[np.arange(8), LAST] = REWARD
    facts = {"rewards": rewards, "scores": SCORES, "logp": np.where(MASK, -1.0, nan)}
    return Trajectory(
        inputs=jnp.zeros(MASK.shape, int),
        actions=jnp.zeros(MASK.shape, int),
        mask=jnp.asarray(MASK),
        group=jnp.asarray([5, 5, 2, 2, 9, 9, 0, 0]),
        **{name: jnp.float32(x) for name, x in (facts | fields).items()},
    )


def test_rewards_lengths_and_signal():
    got = {name: float(value) for name, value in describe(trajectory(), ("right", "long")).items()}
    want = {
        "reward": (1 + 0 + 0.3 + 0.3 + 0.7) / 5,
        "reward_std": np.std([1, 0, 0.3, 0.3, 0.7]),
        "length": 12 / 8,
        "length_max": 3,
        "tokens": 12,
        "not_judged": 3 / 8,
        "no_signal": 6 / 8,
        "reward/right": 3 / 5,
        "reward/long": 30 / 6,
    }
    assert got == pytest.approx(want, rel=1e-6)


def test_truncation_and_distance_to_the_reference_are_shown_where_they_are_known():
    truncated = np.zeros(MASK.shape, bool)
    truncated[[0, 2, 3], [2, 2, 0]] = True  # the last is outside the mask
    traj = trajectory(ref_logp=np.where(MASK, -1.5, nan)).replace(truncated=jnp.asarray(truncated))
    got = describe(traj, ())
    assert got["truncated"] == pytest.approx(2 / 8)
    assert got["kl_sequence"] == pytest.approx(0.5 * 12 / 8)
    assert not any("/" in name for name in got)


def test_a_row_without_a_decision_is_not_judged():
    traj = trajectory().replace(mask=jnp.asarray(MASK & (np.arange(8) != 0)[:, None]))
    got = describe(traj, ())
    assert got["not_judged"] == pytest.approx(4 / 8)
    assert got["reward"] == pytest.approx(1.3 / 4)
    assert reward_and_kl(traj.replace(ref_logp=traj.logp))["reward"] == pytest.approx(1.3 / 4)


def test_reward_with_its_standard_error_and_the_kl_a_sequence():
    got = reward_and_kl(trajectory(ref_logp=np.where(MASK, -1.5, nan)))
    judged = np.array([1, 0, 0.3, 0.3, 0.7])
    want = {"reward": judged.mean(), "error": judged.std(ddof=1) / np.sqrt(5), "kl": 0.5 * 12 / 8}
    assert got == pytest.approx(want, rel=1e-6)


def test_average_takes_means_and_extremes():
    steps = [{"loss": 1.0, "ratio_max": 3.0, "ratio_min": 0.5}, {"loss": 2.0, "ratio_max": 1.0, "ratio_min": 0.25}]
    assert average(steps) == {"loss": 1.5, "ratio_max": 3.0, "ratio_min": 0.25}


@pytest.mark.parametrize("gap", [2e-3, nan])
def test_a_sampler_that_disagrees_with_the_trainer_is_an_error(gap):
    require_on_policy({"sampler_gap": 5e-4})
    with pytest.raises(RuntimeError, match=r"differ by up to .* nats at the first update \(limit 0.001\)"):
        require_on_policy({"sampler_gap": gap})
