import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algorithms import ppo, reinforce
from rljax.algorithms.reinforce import batch_mean_baseline
from rljax.envs.four_rooms import make_four_rooms
from rljax.envs.maze import State, make_maze
from rljax.models import mlp
from rljax.models.policy import make_annotate
from rljax.rollouts.episodes import episodes
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import TrainState, check_shapes
from tests import bounds

UP, DOWN, LEFT, RIGHT = range(4)


def walk(env, actions, at=(0, 0)):
    state, out = State(jnp.asarray(at, jnp.int32), jnp.int32(0)), None
    for action in actions:
        out = env.step(jax.random.key(0), state, action, env.params)
        state = out.state
    return out


@pytest.mark.parametrize(
    ("at", "action", "lands", "reward", "ended"),
    [
        ((0, 0), UP, (0, 0), 0, False),
        ((0, 0), LEFT, (0, 0), 0, False),
        ((0, 0), DOWN, (1, 0), 0, False),
        ((0, 0), RIGHT, (0, 1), 0, False),
        ((1, 1), UP, (0, 1), 0, False),
        ((1, 0), DOWN, (1, 0), 0, False),
        ((0, 1), RIGHT, (0, 2), 10, True),
        ((1, 1), RIGHT, (1, 2), -10, True),
    ],
)
def test_a_step_goes_where_the_map_says(at, action, lands, reward, ended):
    out = walk(make_maze(), [action], at)
    assert tuple(out.state.position.tolist()) == lands
    assert (float(out.reward), bool(out.terminated), bool(out.truncated)) == (reward, ended, False)
    assert int(out.observation.argmax()) == lands[0] * 3 + lands[1]
    assert float(out.observation.sum()) == 1


def test_walls_block_and_time_runs_out():
    walled = make_maze(walls=[(0, 1)], max_steps=2)
    out = walk(walled, [RIGHT, RIGHT])
    assert tuple(out.state.position.tolist()) == (0, 0)
    assert bool(out.truncated)
    assert not bool(out.terminated)


@pytest.mark.parametrize("algorithm", [reinforce(batch_mean_baseline), ppo(gamma=0.9)], ids=["reinforce", "ppo"])
def test_the_update_that_trains_language_models_solves_the_maze(algorithm):
    """One set of functions: the same credit, objective and update, on observations in place of tokens."""
    env, policy, optimizer = make_maze(max_steps=16), mlp.make_mlp_policy(), optax.adam(3e-2)
    params = mlp.init(jax.random.key(0), 6, 4, 16)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(1))
    update = make_update(policy_objective(policy, algorithm), optimizer)
    annotate = make_annotate(policy, algorithm.needs)
    play = jax.jit(lambda params, key: episodes(env, mlp.act, params, key, 64, 16))
    for step in range(40):
        traj = annotate(state, play(state.params, jax.random.key(step)))
        check_shapes(traj)
        if "values" in algorithm.needs and step == 0:
            alone, atol = mlp.annotate(state.params, traj), bounds.of_sum(6 + 16 + 16)
            np.testing.assert_allclose(traj.final_values, alone.final_values, atol=atol)
            full = traj.mask[:, -1]  # as rows of an unroll, which go on
            assert 0 < full.sum() < len(full)
            np.testing.assert_allclose(traj.values[full, -1], alone.values[full, -1], atol=atol)
            assert not traj.values[~full, -1].any()
        state, _ = update(state, algorithm.credit(traj, {}))
    total = jnp.where(traj.mask, traj.rewards, 0.0).sum(axis=1)
    assert float(total.mean()) > 9.0
    assert float(traj.mask.sum(axis=1).mean()) < 4.0 or algorithm.needs == ()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"goal": (1, 2)}, "trap at .* where an episode ends already"),
        ({"start": (0, 2)}, "start at .* where an episode ends already"),
        ({"slip": 2.0}, "slip = 2.0; legal: a probability, 0 to 1"),
        ({"start": None, "walls": ((0, 0), (0, 1), (1, 0), (1, 1))}, "no cell is left to begin in"),
    ],
)
def test_a_maze_without_a_way_is_refused(places, message):
    with pytest.raises(ValueError, match=message):
        make_maze(**places)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"goal": (0, 0)}, "in a wall"),
        ({"start": (8, 9)}, "two cells"),
        ({"goal": (20, 1)}, r"goal at \(20, 1\) is off the grid of 13 x 13"),
        ({"start": (-2, 1)}, r"start at \(-2, 1\) is off the grid of 13 x 13"),
        ({"slip": -0.1}, "slip = -0.1; legal: a probability, 0 to 1"),
    ],
)
def test_four_rooms_without_a_way_too(places, message):
    with pytest.raises(ValueError, match=message):
        make_four_rooms(**places)
