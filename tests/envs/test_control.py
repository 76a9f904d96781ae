"""CartPole, Acrobot, Pendulum, Catch, four rooms, the token MDP: what they do, against other implementations.

The numbers were recorded from gymnax 1.0.1 (test_gymnax.py compares step by step where it is installed).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.envs import acrobot, cartpole, catch, pendulum
from rljax.envs.four_rooms import make_four_rooms
from rljax.envs.maze import maze_mdp
from rljax.envs.tokens import NO_TOKEN, make_token_mdp
from rljax.rollouts.episodes import episodes
from rljax.types import trajectory_of_tokens

KEY = jax.random.key(0)


def play(env, state, actions):
    """Total reward and last step."""

    def one(carry, action):
        out = env.step(KEY, carry, action, env.params)
        return out.state, out

    _, outs = jax.lax.scan(one, state, jnp.asarray(actions))
    return float(outs.reward.sum()), jax.tree.map(lambda x: x[-1], outs)


CART = cartpole.State(jnp.array([0.01, -0.02, 0.03, 0.04]), jnp.int32(0))


@pytest.mark.parametrize(
    ("env", "start", "actions", "total", "observation"),
    [
        (
            cartpole.make_cartpole(),
            CART,
            [1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1],
            12.0,
            [0.0358827, 0.3662511, 0.0045951, -0.4573247],
        ),
        (cartpole.make_cartpole(), CART, [1] * 9, 9.0, [0.1467418, 1.7371143, -0.1706793, -2.6444919]),
        (
            acrobot.make_acrobot(),
            acrobot.State(jnp.array([0.1, -0.05, 0.3, -0.2]), jnp.int32(0)),
            [2, 2, 0, 1, 0, 2, 2],
            -7.0,
            [0.998551, -0.0538138, 0.9952787, 0.0970583, -0.164257, -0.1047987],
        ),
        (
            pendulum.make_pendulum(),
            pendulum.State(jnp.float32(3.0), jnp.float32(0.5), jnp.int32(0)),
            [[1.0], [-3.0], [0.5], [2.0], [2.0], [0.0], [-0.5]],
            -66.117646,
            [-0.9826954, -0.185229, 1.0670276],
        ),
    ],
    ids=["cartpole", "cartpole pushed over", "acrobot", "pendulum"],
)
def test_physics_is_as_recorded(env, start, actions, total, observation):
    reward, last = play(env, start, actions)
    np.testing.assert_allclose(reward, total, rtol=1e-6)
    np.testing.assert_allclose(last.observation, observation, atol=5e-6)


def test_cartpole_fails_by_leaning_and_is_truncated_by_time():
    env = cartpole.make_cartpole(max_steps=9)
    _, last = play(env, CART, [1] * 9)
    assert (bool(last.terminated), bool(last.truncated)) == (False, True)
    _, last = play(env, CART, [1] * 10)  # the pole falls at the very step that would be too many
    assert (bool(last.terminated), bool(last.truncated)) == (True, False)


@pytest.mark.parametrize(("moves", "reward"), [([2, 2, 0, 2, 1, 1, 1, 1, 1], 1.0), ([0] * 9, -1.0)])
def test_catch_pays_at_the_bottom_only(moves, reward):
    """The ball falls in column 4; the paddle begins in column 2."""
    env = catch.make_catch()
    start = catch.State(jnp.array([0, 4]), jnp.int32(2))
    total, last = play(env, start, moves[:-1])
    assert (total, bool(last.terminated)) == (0.0, False)
    assert last.observation.reshape(10, 5)[8].tolist() == [0, 0, 0, 0, 1]
    total, last = play(env, start, moves)
    assert (total, bool(last.terminated), bool(last.truncated)) == (reward, True, False)
    assert float(last.observation.sum()) == (1.0 if reward > 0 else 2.0)


def test_four_rooms_has_doors_and_slips():
    env = make_four_rooms()
    mdp = maze_mdp(env.params, 0.99)
    free = ~env.params.walls.ravel()
    assert int(free.sum()) == 104
    cell, up, wall = 2 * 13 + 2, 1 * 13 + 2, 4 * 13 + 1
    np.testing.assert_allclose(mdp.P[cell, 0, up], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(mdp.P[wall, 2, wall], 2 / 3, rtol=1e-6)  # to the left of (4, 1) is a wall
    np.testing.assert_allclose(mdp.P.sum(axis=2)[free & ~env.params.ends.ravel()], 1.0, rtol=1e-6)
    assert not mdp.P[~free].any()  # walls have the value 0: no episode is ever there
    assert not mdp.R[~free].any()


# ---------------------------------------------------------------------------------------------------------- token MDP

STOP = 3


def test_an_episode_of_the_token_mdp_is_a_rollout_of_a_language_model():
    """Its trajectory is what `trajectory_of_tokens` makes of the same texts."""
    prompts = jnp.array([[0, 1], [2, 2]])
    env = make_token_mdp(prompts, 4, max_tokens=5, reward=lambda tokens, length: 1.0 * (tokens == 1).sum(), stop=STOP)

    def act(params, uniforms, observations):
        return (4 * uniforms[:, 0]).astype(jnp.int32), jnp.full(observations.shape[0], -jnp.log(4.0))

    traj = episodes(env, act, {}, KEY, 64, 5)
    texts = jnp.where(traj.mask, traj.actions, 0)
    tokens = jnp.concatenate([traj.inputs[:, 0, :2], texts], axis=1)
    chosen = jnp.pad(traj.mask, ((0, 0), (2, 0)))
    segments = jnp.pad(traj.mask, ((0, 0), (2, 0)), constant_values=True).astype(jnp.int32)
    ones = (tokens == 1).cumsum(axis=1)  # every token so far is real: padding is 0
    last = chosen & ~jnp.pad(chosen, ((0, 0), (0, 1)))[:, 1:]
    stopped = last & (tokens == STOP)
    facts = {"rewards": jnp.where(last, ones, 0.0), "terminated": stopped, "truncated": last & ~stopped}
    expected = trajectory_of_tokens(tokens, segments, chosen, jnp.where(chosen, -jnp.log(4.0), 0.0), **facts)
    mask = traj.mask
    assert (expected.mask[:, 1:] == mask).all()
    for name in ("actions", "rewards", "terminated", "truncated"):
        mine, other = getattr(traj, name), getattr(expected, name)[:, 1:]
        assert jnp.where(mask, mine == other, True).all(), name
    assert bool(traj.terminated.any())
    assert bool(traj.truncated.any())
    lengths = (traj.inputs != NO_TOKEN).sum(axis=2)  # what is seen at t: the prompt and t tokens
    assert jnp.where(mask, lengths == 2 + jnp.arange(5)[None], True).all()
