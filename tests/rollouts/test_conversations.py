"""Conversations of several turns: masks and ends, the same samples in every mode, log-probs scored all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.policy import make_policy
from rljax.rollouts.conversations import sample_conversations
from rljax.types import Observation, Sampling
from rollouts.common import CONFIG, LM, STOP, make_rows
from tests import bounds

LENGTHS = [2, 9, 4, 7, 1, 6]
SAMPLING = Sampling(n=3, max_tokens=8, stop=STOP)
CONTEXT = 64
SEED, STEP = 3, 5


def answer(turn) -> Observation:
    """Of a turn alone: a reply whose tokens and number depend on what was written, an end by chance."""
    rng = np.random.default_rng(turn.tokens)
    tokens = rng.integers(8, 53, rng.integers(0, 12)).tolist()
    return Observation(tokens, float(rng.normal()), terminated=bool(rng.random() < 0.15), truncated=rng.random() < 0.05)


def respond(turns):
    return [answer(turn) for turn in turns]


@pytest.fixture(scope="module")
def rows():
    return make_rows(LENGTHS, start=40)


def conversations(params, rows, sampling=SAMPLING, **settings):
    settings = {"max_turns": 5, "max_context": CONTEXT} | settings
    return sample_conversations(LM, params, {}, rows, respond, sampling, SEED, STEP, **settings)


@pytest.fixture(scope="module")
def kept(params, rows):
    return conversations(params, rows)


@pytest.mark.parametrize("mode", [{"cache": "prefill"}, {"max_concurrent": 5}, {"max_concurrent": 1}])
def test_every_mode_samples_the_same(params, rows, kept, mode):
    sampling = SAMPLING.replace(max_concurrent=mode.pop("max_concurrent", None))
    traj, counts = conversations(params, rows, sampling, **mode)
    np.testing.assert_array_equal(traj.actions, kept[0].actions)
    jax.tree.map(np.testing.assert_array_equal, counts, kept[1])
    np.testing.assert_allclose(traj.logp, kept[0].logp, rtol=0, atol=bounds.of_logp(CONFIG, traj))
    assert_no_gap(params, traj)


def assert_no_gap(params, traj):
    """The whole conversation scored at once gives the log-probs that its turns were sampled with."""
    logp = jax.jit(make_policy(CONFIG))(params, {}, traj).logp
    assert float(jnp.where(traj.mask, jnp.abs(logp - traj.logp), 0.0).max()) < 1e-5
