"""Exact values of finite processes: linear solve, value iteration, policy iteration in float64, Monte-Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.envs.maze import make_maze, maze_mdp
from rljax.envs.tabular import (
    TabularMDP,
    action_values,
    optimal_action_values,
    optimal_values,
    state_values,
    tabular_env,
)
from rljax.rollouts.episodes import episodes

GAMMA = 0.9


def random_mdp(seed: int, states: int = 7, actions: int = 3):
    """Numpy tables; the last state is terminal."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states, 0.3), (states, actions))
    R = rng.normal(size=(states, actions))
    P[-1], R[-1] = 0.0, 0.0
    return P, R


def policy_iteration(P, R, gamma):
    """Q* in float64: evaluate, be greedy, until nothing changes (Howard 1960)."""
    choice = np.zeros(len(P), int)
    while True:
        rows = np.arange(len(P))
        values = np.linalg.solve(np.eye(len(P)) - gamma * P[rows, choice], R[rows, choice])
        q = R + gamma * P @ values
        better = np.where(q.max(1) > q[rows, choice] + 1e-12, q.argmax(1), choice)
        if (better == choice).all():
            return q
        choice = better


@pytest.mark.parametrize("seed", range(3))
def test_optimal_values_are_those_of_policy_iteration(seed):
    P, R = random_mdp(seed)
    mdp = TabularMDP(jnp.float32(P), jnp.float32(R), GAMMA)
    expected = policy_iteration(P, R, GAMMA)
    np.testing.assert_allclose(optimal_action_values(mdp), expected, atol=1e-5)
    np.testing.assert_allclose(optimal_values(mdp), expected.max(axis=1), atol=1e-5)


def test_values_of_a_policy_are_sums_of_rewards():
    """Against Σ_t γ^t (P_π)^t r_π, term by term in float64."""
    P, R = random_mdp(0)
    policy = np.random.default_rng(1).dirichlet(np.ones(3), 7)
    mdp = TabularMDP(jnp.float32(P), jnp.float32(R), GAMMA)
    moves, term, expected = np.einsum("sa,sat->st", policy, P), (policy * R).sum(1), 0.0
    for _ in range(400):
        expected, term = expected + term, GAMMA * moves @ term
    np.testing.assert_allclose(state_values(mdp, jnp.float32(policy)), expected, atol=1e-5)
    np.testing.assert_allclose(action_values(mdp, jnp.float32(policy)), R + GAMMA * P @ expected, atol=1e-5)


def test_the_maze_has_the_values_of_its_docstring():
    q = optimal_action_values(maze_mdp(make_maze().params, GAMMA))
    table = {
        (0, 0): [8.1, 7.29, 8.1, 9],
        (0, 1): [9, 8.1, 8.1, 10],
        (1, 0): [8.1, 7.29, 7.29, 8.1],
        (1, 1): [9, 8.1, 7.29, -10],
        (0, 2): [0] * 4,
        (1, 2): [0] * 4,
    }
    for (row, column), expected in table.items():
        np.testing.assert_allclose(q[3 * row + column], expected, atol=1e-5)


def test_values_are_means_of_returns():
    """V^π of the start by 25,000 episodes of the uniform policy in a maze that slips: within 3 standard errors."""
    maze = make_maze(slip=0.3)
    mdp = maze_mdp(maze.params, GAMMA)
    uniform = jnp.full((6, 4), 0.25)

    def act(params, uniforms, observations):
        return (4 * uniforms[:, 0]).astype(jnp.int32), jnp.zeros(observations.shape[0])

    for env in (maze, tabular_env(mdp)):
        traj = jax.jit(lambda key, env=env: episodes(env, act, {}, key, 25_000, 60))(jax.random.key(1))
        returns = (jnp.where(traj.mask, traj.rewards, 0.0) * GAMMA ** jnp.arange(60)[None]).sum(axis=1)
        error = returns.std() / jnp.sqrt(len(returns))
        assert abs(returns.mean() - state_values(mdp, uniform)[0]) < 3 * error
        assert error < 0.04


def test_positions_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"goal at \(2, 0\) is off the grid of 2 x 3"):
        make_maze(goal=(2, 0))
    with pytest.raises(ValueError, match=r"start at \(0, 0\) is in a wall"):
        make_maze(walls=((0, 0),))


def test_an_episode_may_begin_anywhere_free():
    env = make_maze(start=None, walls=((1, 0),))
    observations, _ = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(jax.random.key(0), 300), env.params)
    np.testing.assert_allclose(observations.mean(axis=0), [1 / 3, 1 / 3, 0, 0, 1 / 3, 0], atol=0.1)
