"""Groups that wait for their longest completions: several steps of a policy that changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.policy import make_policy
from rljax.rollouts.partial import (
    carry_from_arrays,
    carry_to_arrays,
    empty_carry,
    fit_columns,
    partial_step,
    resume_rows,
    split_finished_groups,
    unfinished_rows,
)
from rljax.rollouts.sampler import sample
from rljax.types import Sampling
from rollouts.common import CLOSE, CONFIG, LM, draws, make_rows, take
from tests import bounds

SEED, STEPS, LEARNT, WAIT, N = 1, 4, 5, 3, 4
LENGTHS = [2, 9, 4, 7, 1, 9, 3, 6] + [5, 3, 8, 2, 6] * (STEPS - 1)
SAMPLING = Sampling(n=N, max_tokens=16, stop=tuple(range(8)))
WIDTH = 9 + 16
POLICY = jax.jit(make_policy(CONFIG))


@pytest.fixture(scope="module")
def rows():
    return make_rows(LENGTHS, start=40)


def run(policies, rows, max_concurrent=None):
    """What is learned from at each step."""
    sampling = SAMPLING.replace(stop_after=(LEARNT + WAIT) * N - WAIT, max_concurrent=max_concurrent)
    first, carried, learned = 0, None, []
    for step, params in enumerate(policies):
        count = LEARNT if step else LEARNT + WAIT
        fresh = take(rows, slice(first, first + count))
        first += count

        def draw(rows, params=params, step=step):
            return sample(LM, params, {}, rows, sampling, SEED, step)

        traj, drawn, carried = partial_step(draw, fresh, carried, N, WAIT, step, WIDTH)
        assert len(carried.number) == WAIT * N
        assert set(traj.group.tolist()) <= set(drawn.number.tolist())
        learned.append(jax.tree.map(np.asarray, traj))
    return learned, carried


@pytest.mark.parametrize("max_concurrent", [None, 6])
def test_every_group_leaves_once_with_the_completions_it_would_have_had(params, rows, max_concurrent):
    learned, carried = run([params] * STEPS, rows, max_concurrent)
    left = np.concatenate([traj.group for traj in learned])
    numbers, times = np.unique(np.concatenate([left, carried.number]), return_counts=True)
    np.testing.assert_array_equal(numbers, rows.number)
    assert (times == N).all()
    never = [sample(LM, params, {}, rows, SAMPLING, SEED, step) for step in range(STEPS)]
    margins = [draws(params, rows, SAMPLING, SEED, step, whole)[1] for step, whole in enumerate(never)]
    waited = 0
    for traj in learned:
        assert not unfinished_rows(traj).any()
        began = first_versions(traj)
        waited += int((np.where(traj.mask, traj.version, -1).max(axis=1) > began).sum())
        for row in range(len(began)):
            step, place = began[row], (traj.group[row] - 40) * N + row % N
            if (margins[step][place] < CLOSE).any():
                continue
            for name in ("actions", "terminated", "truncated", "positions"):
                got, want = np.asarray(getattr(traj, name))[row], np.asarray(getattr(never[step], name))[place]
                np.testing.assert_array_equal(got[traj.mask[row]], want[np.asarray(never[step].mask)[place]], name)
    assert waited >= 3


def first_versions(traj):
    """The step each group began in: the first version among its completions' first tokens."""
    version = np.where(traj.mask, traj.version, 10**6).min(axis=1)
    return version.reshape(-1, N).min(axis=1).repeat(N)


def test_after_updates_each_token_has_the_log_prob_of_the_policy_that_drew_it(params, rows):
    """The gap between sampler and trainer, with weights that change between the steps."""
    wide = [{"decoder": jax.tree.map(lambda x, s=s: x * (1 + 0.1 * s), params["decoder"])} for s in range(STEPS)]
    learned, _ = run(wide, rows)
    mixed = 0
    for traj in learned:
        for version, of_version in enumerate(wide):
            mine = traj.mask & (np.asarray(traj.version) == version)
            logp = POLICY(of_version, {}, traj).logp
            assert float(jnp.where(mine, jnp.abs(logp - traj.logp), 0.0).max()) <= bounds.of_logp(CONFIG, traj)
        versions = np.where(traj.mask, traj.version, -1)
        mixed += int((versions.max(axis=1) != np.where(traj.mask, traj.version, 99).min(axis=1)).sum())
    assert mixed >= 3


def test_what_does_not_fit_is_refused(params, rows):
    drawn = take(rows, slice(0, 4))
    traj = sample(LM, params, {}, drawn, SAMPLING.replace(stop_after=4), SEED, 0)
    with pytest.raises(ValueError, match="groups are finished, 4 are needed"):
        split_finished_groups(traj, 4)
    with pytest.raises(ValueError, match="width is 5; legal: at least"):
        resume_rows(drawn, traj, N, 0, width=5)
    with pytest.raises(ValueError, match="legal: at least"):
        fit_columns(traj, 5)


def test_what_waits_is_kept_in_a_checkpoint(params, rows):
    _, carried = run([params] * 2, rows)
    stored, empty = carry_to_arrays(carried), empty_carry(WAIT, N, WIDTH)
    assert carry_from_arrays(empty, None) is None
    assert {k: (v.shape, v.dtype) for k, v in stored.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
    again = carry_from_arrays(stored, lambda numbers: [{} for _ in numbers])
    jax.tree.map(np.testing.assert_array_equal, again._replace(cursor=0), carried._replace(cursor=0))
