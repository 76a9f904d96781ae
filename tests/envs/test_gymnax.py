"""Our environments against gymnax's, step by step. Skipped where gymnax is absent (`pip install rljax[envs]`)."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.envs.acrobot import State as AcrobotState
from rljax.envs.acrobot import make_acrobot
from rljax.envs.cartpole import State as CartPoleState
from rljax.envs.cartpole import make_cartpole
from rljax.envs.catch import State as CatchState
from rljax.envs.catch import make_catch
from rljax.envs.env import Box
from rljax.envs.four_rooms import make_four_rooms
from rljax.envs.gymnax import convert_action_space, make_gymnax
from rljax.envs.maze import State as MazeState
from rljax.envs.maze import cell_index
from rljax.envs.pendulum import State as PendulumState
from rljax.envs.pendulum import make_pendulum

STEPS = 550


def test_without_gymnax_the_error_says_what_to_install():
    try:
        import gymnax  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"rljax\[envs\]"):
            make_gymnax("CartPole-v1")
    else:
        with pytest.raises(ValueError, match=r"it has .*CartPole-v1"):
            make_gymnax("CartPole-v9")


def test_spaces_that_no_policy_here_can_act_in_are_refused():
    assert convert_action_space(SimpleNamespace(n=3)) == 3
    assert convert_action_space(SimpleNamespace(shape=(2,), low=-1.0, high=jnp.array([1.0, 2.0]))) == Box(
        (-1.0, -1.0), (1.0, 2.0)
    )
    with pytest.raises(ValueError, match="Discrete or a Box of one axis"):
        convert_action_space(SimpleNamespace(shape=(2, 2)))


def test_actions_are_clipped_to_their_bounds_and_errors_of_an_environment_are_its_own(monkeypatch):
    """An environment of gymnax's kind that clips nothing, as Reacher and Swimmer: its reward is the action."""

    def make(name, size=1):
        if size > 2:
            raise ValueError("size is too large")
        space = SimpleNamespace(shape=(size,), low=-1.0, high=1.0)
        return SimpleNamespace(
            action_space=lambda params: space,
            step_env=lambda key, state, action, params: (action, state, action.sum(), False, {}),
            is_truncated=lambda state, params: False,
        ), None

    monkeypatch.setitem(sys.modules, "gymnax", SimpleNamespace(make=make, registered_envs=["Push-misc"]))
    env = make_gymnax("Push-misc", size=2)
    rewards = [float(env.step(None, None, jnp.array(x), None).reward) for x in ([3.0, 0.25], [1.0, 0.25], [-7.0, -7.0])]
    assert rewards == [1.25, 1.25, -2.0]
    with pytest.raises(ValueError, match="size is too large"):
        make_gymnax("Push-misc", size=3)
    with pytest.raises(ValueError, match=r"gymnax has no 'Pull-misc'; it has Push-misc"):
        make_gymnax("Pull-misc")


PAIRS = {
    "CartPole-v1": (
        make_cartpole(),
        lambda s: CartPoleState(jnp.stack([s.x, s.x_dot, s.theta, s.theta_dot]), jnp.int32(s.time)),
    ),
    "Acrobot-v1": (
        make_acrobot(),
        lambda s: AcrobotState(
            jnp.stack([s.joint_angle1, s.joint_angle2, s.velocity_1, s.velocity_2]), jnp.int32(s.time)
        ),
    ),
    "Pendulum-v1": (make_pendulum(), lambda s: PendulumState(s.theta, s.theta_dot, jnp.int32(s.time))),
    "Catch-bsuite": (make_catch(), lambda s: CatchState(jnp.stack([s.ball_y, s.ball_x]), jnp.int32(s.paddle_x))),
    "FourRooms-misc": (
        make_four_rooms(slip=0.0, observe=cell_index),
        lambda s: MazeState(s.pos.astype(jnp.int32), jnp.int32(s.time)),
    ),
}
TO_GYMNAX = {"FourRooms-misc": jnp.array([0, 2, 3, 1])}  # up, down, left, right as it numbers them


@pytest.mark.parametrize("name", PAIRS)
def test_every_step_is_gymnaxs_step(name):
    """From the same state, gymnax's own, at every step of a long walk through resets."""
    pytest.importorskip("gymnax")
    ours, convert = PAIRS[name]
    theirs = make_gymnax(name)
    params = theirs.params.replace(fail_prob=0.0) if name == "FourRooms-misc" else theirs.params
    assert ours.actions == theirs.actions

    def one(carry, key):
        _, state = carry
        draw, move, again = jax.random.split(key, 3)
        if isinstance(ours.actions, Box):
            own = action = jax.random.uniform(draw, (1,), minval=-3.0, maxval=3.0)
        else:
            own = jax.random.randint(draw, (), 0, ours.actions)
            action = TO_GYMNAX[name][own] if name in TO_GYMNAX else own
        mine = ours.step(move, convert(state), own, ours.params)
        out = theirs.step(move, state, action, params)
        seen = mine.observation
        if name == "FourRooms-misc":  # theirs shows the positions of walker and goal
            row, column = jnp.divmod(seen, 13)
            seen = jnp.stack([row, column, 8, 9]).astype(jnp.float32)
        facts = (seen, mine.reward, mine.terminated, mine.truncated)
        expected = (out.observation, out.reward, out.terminated, out.truncated)
        ended = out.terminated | out.truncated
        following = jax.tree.map(
            lambda first, last: jnp.where(ended, first, last),
            theirs.reset(again, params),
            (out.observation, out.state),
        )
        return following, (facts, expected)

    start = theirs.reset(jax.random.key(0), params)
    _, (facts, expected) = jax.lax.scan(one, start, jax.random.split(jax.random.key(1), STEPS))
    if name == "CartPole-v1":  # gymnax's resets tell the first step of an episode apart from no other
        expected = (expected[0], jnp.ones(STEPS), *expected[2:])
    for mine, other in zip(facts, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(other, np.float64), rtol=1e-5, atol=2e-5)
    assert bool(facts[2].any() | facts[3].any())


def test_four_rooms_goes_astray_a_third_of_the_time():
    """Shares of 20,000 steps up from the middle of a room, against gymnax's."""
    pytest.importorskip("gymnax")
    theirs, ours = make_gymnax("FourRooms-misc"), make_four_rooms(start=(2, 2), observe=cell_index)
    keys = jax.random.split(jax.random.key(0), 20_000)
    _, state = theirs.reset(keys[0], theirs.params)
    state = state.replace(pos=jnp.array([2, 2]))
    other = jax.vmap(lambda k: theirs.step(k, state, 0, theirs.params).observation)(keys)
    _, begun = ours.reset(keys[0], ours.params)
    mine = jax.vmap(lambda k: ours.step(k, begun, 0, ours.params).observation)(keys)
    shares = [
        jnp.bincount(cells.astype(jnp.int32), length=169) / len(keys)
        for cells in (other @ jnp.array([13.0, 1, 0, 0]), mine)
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.02)
    np.testing.assert_allclose(shares[1][1 * 13 + 2], 2 / 3, atol=0.02)
