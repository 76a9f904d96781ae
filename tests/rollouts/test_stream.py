"""Answers while they are drawn: those of `sample`, in pieces, by a few programs."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from rljax.rollouts.decode_state import place, settle, trajectory
from rljax.rollouts.sampler import sample
from rljax.rollouts.streaming import stream

from rljax.rollouts import stream as module
from rljax.types import Sampling
from rollouts.common import LM, STOP, assert_same_sample, draws, make_rows

SAMPLING = Sampling(n=2, max_tokens=40, stop=STOP)


@pytest.fixture(scope="module")
def rows():
    return make_rows([2, 9, 4, 7])


@pytest.fixture
def small_room(monkeypatch):
    """8, 16, 32, 40 columns."""
    monkeypatch.setattr(module, "ROOM", 8)


@pytest.mark.parametrize("every", [1, 5, 100])
def test_the_answers_of_sample_in_pieces(params, rows, small_room, every):
    traj = sample(LM, params, {}, rows, SAMPLING, 4, 3)
    seen = list(stream(LM, params, {}, rows, SAMPLING, 4, 3, every))
    prompts = place(rows, 3)
    got = trajectory(prompts, settle(prompts, SAMPLING, jnp.int32(4)), SAMPLING, seen[-1], None)
    assert_same_sample(SAMPLING, traj, got, draws(params, rows, SAMPLING, 4, 3, traj)[1])
    np.testing.assert_array_equal(got.terminated, traj.terminated)
    np.testing.assert_array_equal(got.truncated, traj.truncated)
    assert seen[-1].over.all()
    assert (seen[0].drawn <= every).all()
    for before, after in itertools.pairwise(seen):
        new = after.drawn - before.drawn
        assert (new[before.over] == 0).all()
        assert 0 < new.max() <= every
        for row, drawn in enumerate(before.drawn):
            np.testing.assert_array_equal(before.tokens[row, :drawn], after.tokens[row, :drawn])
            np.testing.assert_array_equal(before.logp[row, :drawn], after.logp[row, :drawn])


def test_it_ends_with_enough_answers(params, rows):
    *_, last = stream(LM, params, {}, rows, SAMPLING.replace(stop_after=3), 4, 3, every=1)
    assert 3 <= last.over.sum() < 8


def test_a_program_for_each_size_of_the_cache(params, rows, small_room):
    traced = []

    def forward(*args):
        traced.append(args)
        return LM.forward(*args)

    lm = LM._replace(forward=forward)
    every_one = SAMPLING.replace(stop=())
    assert len(list(stream(lm, params, {}, rows, every_one, 0, 0, every=4))) == 10
    programs = len(traced)
    assert programs <= 1 + 2 * 4  # JAX may trace the body of a loop twice
    other = make_rows([9, 1, 1, 1], start=50)
    for rows_, temperature, seed, step, every in [(other, 1.0, 1, 0, 4), (rows, 0.0, 0, 9, 7)]:
        list(stream(lm, params, {}, rows_, every_one.replace(temperature=temperature), seed, step, every))
    assert len(traced) == programs


@pytest.mark.parametrize("wrong", [{"max_concurrent": 3}, {"every": 0}, {"temperature": -1.0}])
def test_what_a_stream_cannot_do(params, rows, wrong):
    every = wrong.pop("every", 1)
    with pytest.raises(ValueError, match="legal"):
        next(stream(LM, params, {}, rows, SAMPLING.replace(**wrong), 0, 0, every))
