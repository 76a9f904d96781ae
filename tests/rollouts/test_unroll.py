"""Unrolls against environments stepped one at a time by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.envs.cartpole import make_cartpole
from rljax.envs.pendulum import make_pendulum
from rljax.models import mlp
from rljax.rollouts.episodes import episodes
from rljax.rollouts.unroll import begin, chance, finished, unroll

ENV = make_cartpole(max_steps=12)
ROWS, LENGTH = 3, 40


def act(params, uniforms, observations):
    actions = (uniforms[:, 0] < 0.5).astype(jnp.int32)
    return actions, jnp.full(actions.shape, -0.7)


@pytest.fixture(scope="module")
def unrolled():
    """(first carry, an unroll, the carry after it, the unroll that goes on)"""
    first = begin(ENV, jax.random.key(0), ROWS)
    play = jax.jit(lambda key, carry: unroll(ENV, act, {}, chance(ENV, key, ROWS, LENGTH), carry))
    carry, traj = play(jax.random.key(1), first)
    return first, traj, carry, play(jax.random.key(2), carry)[1]


def test_every_decision_leads_where_the_environment_says(unrolled):
    first, traj, *_ = unrolled
    traj, step = jax.device_get(traj), jax.jit(ENV.step)
    for row in range(ROWS):
        state = jax.tree.map(lambda x: x[row], first[1])  # noqa: B023
        for t in range(LENGTH):
            np.testing.assert_allclose(traj.inputs[row, t], state.physics, atol=1e-6)
            out = step(jax.random.key(0), state, traj.actions[row, t], ENV.params)
            np.testing.assert_allclose(traj.next_inputs[row, t], out.observation, rtol=1e-5, atol=1e-6)
            assert bool(traj.terminated[row, t]) == bool(out.terminated)
            assert bool(traj.truncated[row, t]) == bool(out.truncated)
            state = out.state
            if out.terminated | out.truncated:
                if t + 1 == LENGTH:
                    break
                state = state._replace(physics=traj.inputs[row, t + 1], time=np.int32(0))
                assert bool((np.abs(state.physics) <= 0.05).all())
    assert bool(traj.terminated.any())
    assert bool(traj.truncated.any())


def test_the_next_unroll_goes_on(unrolled):
    _, traj, carry, following = unrolled
    np.testing.assert_array_equal(carry[0], following.inputs[:, 0])
    ended = (traj.terminated | traj.truncated)[:, -1]
    same = (traj.next_inputs[:, -1] == following.inputs[:, 0]).all(axis=1)
    assert (same == ~ended).all()


def test_returns_of_finished_episodes_are_added_up_across_unrolls(unrolled):
    _, traj, _, following = unrolled
    running, total, count = jnp.zeros(ROWS), 0.0, 0
    for each in (traj, following):
        returns, ended, running = finished(each, running)
        total, count = total + float(returns), count + int(ended)
    ends = np.concatenate([x.terminated | x.truncated for x in (traj, following)], axis=1)
    rewards = np.concatenate([x.rewards for x in (traj, following)], axis=1)
    expected, left = [], []
    for row in range(ROWS):
        earned = 0.0
        for reward, end in zip(rewards[row], ends[row], strict=True):
            earned += reward
            if end:
                expected.append(earned)
                earned = 0.0
        left.append(earned)
    assert (total, count) == (sum(expected), len(expected))
    np.testing.assert_allclose(running, left)


def test_an_episode_a_row_ends_once(unrolled):
    traj = jax.jit(lambda key: episodes(ENV, act, {}, key, 20, 11))(jax.random.key(0))
    ends = traj.terminated | traj.truncated
    assert (ends.sum(axis=1) == 1).all()
    assert (jnp.argmax(ends, axis=1) + 1 == traj.mask.sum(axis=1)).all()
    assert (traj.rewards.sum(axis=1) == traj.mask.sum(axis=1)).all()
    assert bool(traj.truncated[:, -1].any())  # still running when it was cut


@pytest.mark.parametrize("env", [ENV, make_pendulum()], ids=["discrete", "continuous"])
def test_the_trainer_finds_the_samplers_log_probs(env):
    """So that ratios are 1 at the first update; values and distribution are those of the right observations."""
    continuous = not isinstance(env.actions, int)
    observation = 3 if continuous else 4
    params = mlp.init(jax.random.key(0), observation, 1 if continuous else 2, 16, continuous)
    params["actor"]["layers"][-1] = jax.tree.map(lambda x: 30 * x, params["actor"]["layers"][-1])  # no uniform policy
    key = jax.random.key(1)

    @jax.jit
    def play(params):
        _, traj = unroll(env, mlp.act, params, chance(env, key, 8, 30), begin(env, key, 8))
        traj = mlp.annotate(params, traj)
        return traj, mlp.make_mlp_policy()(params, {}, traj)

    traj, output = play(params)
    np.testing.assert_allclose(output.logp, traj.logp, atol=1e-5)
    np.testing.assert_allclose(output.kl, 0.0, atol=1e-6)
    np.testing.assert_allclose(output.values, traj.values[:, :-1], atol=1e-6)
    ended = traj.terminated | traj.truncated
    np.testing.assert_allclose(
        jnp.where(ended[:, :-1], 0, traj.final_values[:, :-1]),
        jnp.where(ended[:, :-1], 0, traj.values[:, 1:-1]),
        atol=1e-5,
    )
    np.testing.assert_allclose(traj.values[:, -1], traj.final_values[:, -1])
    if continuous:
        standard = (traj.actions - traj.dist[0]) / traj.dist[1]
        assert abs(float(standard.mean())) < 0.25
        assert abs(float(standard.std()) - 1) < 0.2
    else:
        shown = jax.nn.softmax(traj.dist)[..., 1]
        assert abs(float((traj.actions - shown).mean())) < 0.1
