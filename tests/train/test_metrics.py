"""What a rollout shows, by hand on four prompts of two answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.train.metrics import average_metrics, credit_metrics, require_on_policy, reward_and_kl, rollout_metrics
from rljax.types import Batch, Trajectory

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
    got = {name: float(value) for name, value in rollout_metrics(trajectory(), ("right", "long")).items()}
    want = {
        "reward": (1 + 0 + 0.3 + 0.3 + 0.7) / 5,
        "reward_std": np.std([1, 0, 0.3, 0.3, 0.7]),
        "reward_max": 1,
        "reward_min": 0,
        "solved_all": 2 / 8,
        "solved_none": 2 / 8,  # the group without a judged row counts in neither
        "length": 12 / 8,
        "length_max": 3,
        "length_min": 1,
        "frac_empty": 0,
        "tokens": 12,
        "frac_reward_failed": 3 / 8,
        "frac_reward_zero_std": 2 / 4,  # of two groups several rows are judged
        "reward/right": 3 / 5,
        "reward/right_std": np.std([1, 0, 1, 1, 0]),
        "reward/long": 30 / 6,
        "reward/long_std": np.std([5, 5, 7, 5, 5, 3]),
    }
    assert got == pytest.approx(want, rel=1e-6)


def test_what_was_not_measured_is_no_number():
    """No row is judged; each prompt has one completion; no decision is left to learn from."""
    unjudged = trajectory(rewards=np.where(MASK, nan, 0.0), scores=np.full((8, 1), nan), ref_logp=np.zeros(MASK.shape))
    found = rollout_metrics(unjudged, ("right",))
    names = ("reward", "reward_std", "reward_max", "reward_min", "reward/right", "frac_reward_zero_std")
    assert np.isnan([found[name] for name in names]).all()
    assert found["frac_reward_failed"] == 1
    assert np.isnan(reward_and_kl(unjudged)["reward"])
    alone = trajectory().replace(group=jnp.arange(8))
    assert np.isnan(rollout_metrics(alone, ())["frac_reward_zero_std"])
    zeros = jnp.zeros(MASK.shape)
    empty = Batch(trajectory(values=np.zeros((8, 4))), advantages=zeros, returns=zeros, mask=zeros > 0)
    assert all(np.isnan(value) for value in credit_metrics(empty).values())


def test_groups_are_solved_by_all_or_by_none():
    """By the first score, whatever the rewards are: {1, 0}, {1, 1}, {0}, and a group that was not judged."""
    for above, solved in {0.0: (2 / 8, 2 / 8), 1.0: (0, 6 / 8), -1.0: (6 / 8, 0)}.items():
        got = rollout_metrics(trajectory(), (), above=above)
        assert (got["solved_all"], got["solved_none"]) == solved


def test_truncation_and_distance_to_the_reference_are_shown_where_they_are_known():
    truncated = np.zeros(MASK.shape, bool)
    truncated[[0, 2, 3], [2, 2, 0]] = True  # the last is outside the mask
    traj = trajectory(ref_logp=np.where(MASK, -1.5, nan)).replace(truncated=jnp.asarray(truncated))
    got = rollout_metrics(traj, ())
    assert got["truncated"] == pytest.approx(2 / 8)
    assert got["kl_sequence"] == pytest.approx(0.5 * 12 / 8)
    assert not any("/" in name for name in got)


def test_a_row_without_a_decision_is_not_judged():
    traj = trajectory().replace(mask=jnp.asarray(MASK & (np.arange(8) != 0)[:, None]))
    got = rollout_metrics(traj, ())
    assert got["frac_reward_failed"] == pytest.approx(4 / 8)
    assert got["reward"] == pytest.approx(1.3 / 4)
    assert (got["frac_empty"], got["length_min"]) == (pytest.approx(1 / 8), 0)
    assert reward_and_kl(traj.replace(ref_logp=traj.logp))["reward"] == pytest.approx(1.3 / 4)


def test_reward_with_its_standard_error_and_the_kl_a_sequence():
    traj = trajectory(ref_logp=np.where(MASK, -1.5, nan))
    got = reward_and_kl(traj.replace(group=jnp.arange(8)))
    judged = np.array([1, 0, 0.3, 0.3, 0.7])
    want = {"reward": judged.mean(), "error": judged.std(ddof=1) / np.sqrt(5), "kl": 0.5 * 12 / 8}
    assert got == pytest.approx(want, rel=1e-6)
    of_prompts = np.array([1 + 0, 0.3 + 0.3, 0.7]) - judged.mean() * np.array([2, 2, 1])
    assert reward_and_kl(traj)["error"] == pytest.approx(np.sqrt(3 / 2 * (of_prompts**2).sum()) / 5, rel=1e-6)
    assert np.isnan(reward_and_kl(traj.replace(group=jnp.zeros(8, int)))["error"])


def test_the_gap_between_sampler_and_trainer_is_shown_where_both_are_known():
    logp = np.where(MASK, np.random.default_rng(0).normal(size=MASK.shape) - 1, nan)
    got = rollout_metrics(trajectory(old_logp=logp), ())
    assert got["sampler_kl"] == pytest.approx((-1.0 - logp[MASK]).mean(), rel=1e-5)
    assert not any(name.startswith("sampler_") for name in rollout_metrics(trajectory(), ()))


def test_credit_is_described_over_the_batchs_own_mask():
    draw = np.random.default_rng(1)
    mask = MASK & (np.arange(8) != 2)[:, None]
    advantages, returns, values = (np.where(mask, draw.normal(size=MASK.shape), nan) for _ in range(3))
    traj = trajectory(values=np.pad(values, ((0, 0), (0, 1))))
    batch = Batch(traj=traj, advantages=jnp.float32(advantages), returns=jnp.float32(returns), mask=jnp.asarray(mask))
    want = {"explained_variance": 1 - (returns - values)[mask].var(ddof=1) / (returns[mask].var(ddof=1) + 1e-5)}
    for name, x in {"advantage": advantages, "return": returns, "value": values}.items():
        x = x[mask]
        want |= {name: x.mean(), f"{name}_std": x.std(ddof=1), f"{name}_max": x.max(), f"{name}_min": x.min()}
    got = {name: float(value) for name, value in credit_metrics(batch).items()}
    assert got == pytest.approx(want, rel=1e-4)
    assert set(credit_metrics(batch.replace(returns=None, traj=trajectory()))) == {
        "advantage",
        "advantage_std",
        "advantage_max",
        "advantage_min",
    }


def test_ratios_have_their_spread_and_their_effective_share():
    ratios = np.random.default_rng(2).lognormal(size=(2, 50))
    steps = [{"ratio": row.mean(), "ratio_squared": (row**2).mean()} for row in ratios]
    want = {
        "ratio": ratios.mean(),
        "ratio_std": ratios.std(),
        "ess_fraction": 1 / ((ratios / ratios.mean()) ** 2).mean(),
    }
    assert average_metrics(steps) == pytest.approx(want)
    same = average_metrics([{"ratio": 1.0, "ratio_squared": 1.0 - 1e-7}])  # rounding
    assert same == {"ratio": 1.0, "ratio_std": 0.0, "ess_fraction": 1.0}


def test_average_takes_means_and_extremes():
    steps = [{"loss": 1.0, "ratio_max": 3.0, "ratio_min": 0.5}, {"loss": 2.0, "ratio_max": 1.0, "ratio_min": 0.25}]
    assert average_metrics(steps) == {"loss": 1.5, "ratio_max": 3.0, "ratio_min": 0.25}


def test_an_update_that_measured_nothing_does_not_count_in_a_mean():
    """But a loss that is not finite is not passed over: the run is to stop."""
    empty = {"ratio": nan, "ratio_squared": nan, "ratio_max": -np.inf, "entropy": nan, "loss": 0.0}
    steps = [empty, {"ratio": 1.0, "ratio_squared": 1.25, "ratio_max": 2.0, "entropy": 0.5, "loss": 1.0}]
    want = {"ratio": 1.0, "ratio_max": 2.0, "entropy": 0.5, "loss": 0.5, "ratio_std": 0.5, "ess_fraction": 0.8}
    assert average_metrics(steps) == pytest.approx(want)
    found = average_metrics([empty | {"loss": nan}, empty])
    assert all(np.isnan(found[name]) for name in ("loss", "ratio", "ratio_std", "ess_fraction", "entropy"))
    require_on_policy({"sampler_gap": -np.inf, "clip_fraction_first": nan})  # there is nothing to compare


def test_metrics_come_to_the_host_together():
    """All copies have begun when the first is waited for."""
    calls = []

    class OnDevice:
        def copy_to_host_async(self):
            calls.append("begin")

        def __array__(self, dtype=None, copy=None):
            calls.append("wait")
            return np.array(2.0, np.float32)

    assert average_metrics([{"loss": OnDevice(), "kl": OnDevice()} for _ in range(2)]) == {"loss": 2.0, "kl": 2.0}
    assert calls == ["begin"] * 4 + ["wait"] * 4


@pytest.mark.parametrize("gap", [2e-3, nan])
def test_a_sampler_that_disagrees_with_the_trainer_is_an_error(gap):
    require_on_policy({"sampler_gap": 5e-4})
    with pytest.raises(RuntimeError, match=r"differ by up to .* nats at the first update \(limit 0.001\)"):
        require_on_policy({"sampler_gap": gap})
