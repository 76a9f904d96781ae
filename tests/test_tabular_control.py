"""Tabular control on the 2x3 maze, against its exact values: a hundred seeds, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.control_methods import dqn, tabular
from experiments.control_methods.tabular import Hyperparams
from rljax.envs.maze import cell_index, make_maze, maze_mdp
from rljax.envs.tabular import action_values, optimal_action_values
from rljax.models import mlp

GAMMA, SEEDS = 0.9, 100
MAZE = make_maze(start=None, observe=cell_index)
MDP = maze_mdp(MAZE.params, GAMMA)
TRUTH = np.asarray(optimal_action_values(MDP))
INSIDE = [0, 1, 3, 4]  # cells where an action is chosen


def learn(method, steps, hyper, truth=TRUTH, seeds=SEEDS):
    train = jax.jit(jax.vmap(tabular.make_train(MAZE, method, 6, steps), (0, None, None)))
    return train(jax.random.split(jax.random.key(0), seeds), jax.tree.map(jnp.float32, hyper), jnp.asarray(truth))


def optimal(q):
    """For each seed, whether acting greedily by q is optimal in every cell."""
    greedy = np.argmax(q[:, INSIDE], axis=2)
    truth = np.broadcast_to(TRUTH[INSIDE], q[:, INSIDE].shape)
    value = np.take_along_axis(truth, greedy[..., None], axis=2)[..., 0]
    return (value > TRUTH[INSIDE].max(axis=1) - 1e-4).all(axis=1)


def test_q_learning_finds_the_optimal_values():
    found = learn(tabular.Q_LEARNING, 2000, Hyperparams(alpha=0.5, epsilon=1.0))
    assert (np.asarray(found.distance[:, -1]) < 1e-2).all()
    assert optimal(np.asarray(found.q)).all()
    path = []
    cell = 0
    while cell in INSIDE and len(path) < 5:
        path.append(int(np.argmax(found.q[0, cell])))
        cell += (-3, 3, -1, 1)[path[-1]]
    assert (len(path), cell) == (2, 2)
    assert (found.visits.sum(axis=(1, 2)) == 2000).all()


def test_q_learning_by_its_own_policy_finds_an_optimal_one():
    found = learn(tabular.Q_LEARNING, 5000, Hyperparams(alpha=0.5, epsilon=0.3))
    assert optimal(np.asarray(found.q)).sum() >= 99


def test_double_q_learning_finds_the_optimal_values():
    found = learn(tabular.DOUBLE_Q, 5000, Hyperparams(alpha=0.5, epsilon=1.0))
    assert (np.asarray(found.distance[:, -1]) < 1e-2).all()


def epsilon_greedy_values(epsilon):
    """Q^π of the ε-greedy policy that is greedy in its own Q^π, by iterated evaluation."""
    q = np.zeros_like(TRUTH)
    for _ in range(50):
        policy = np.full(q.shape, epsilon / 4)
        policy[np.arange(6), q.argmax(axis=1)] += 1 - epsilon
        q = np.asarray(action_values(MDP, jnp.asarray(policy, jnp.float32)))
    return q


@pytest.mark.parametrize(
    ("method", "hyper", "bound"),
    [
        pytest.param(tabular.EXPECTED_SARSA, Hyperparams(alpha=0.5, epsilon=1.0), 1e-2, marks=pytest.mark.nightly),
        (tabular.SARSA, Hyperparams(alpha=1.0, power=0.8, epsilon=1.0), 0.5),
        (tabular.EXPECTED_SARSA, Hyperparams(alpha=1.0, power=0.6, epsilon=0.5), 1e-1),
    ],
    ids=["expected sarsa, random", "sarsa, random", "expected sarsa, on its policy"],
)
def test_sarsa_finds_the_values_of_its_own_policy(method, hyper, bound):
    """Where step sizes shrink as N^-power, or the target is an expectation. SARSA samples a' and is less precise."""
    truth = epsilon_greedy_values(hyper.epsilon)
    found = learn(method, 20_000, hyper, truth, seeds=20)
    distance = np.abs(np.asarray(found.q) - truth)[:, INSIDE]
    assert np.median(distance.max(axis=(1, 2))) < bound
    assert np.abs(np.asarray(found.q).mean(axis=0) - truth)[INSIDE].max() < bound


@pytest.mark.parametrize("method", [tabular.Q_LEARNING, tabular.DOUBLE_Q], ids=["q_learning", "double_q"])
def test_a_step_of_one_over_n_averages(method):
    """A step that ends the episode has one target, its reward: right after one visit, and later ones change nothing.

    This holds for each table; 300 steps visit it in both.
    """
    found = learn(method, 300, Hyperparams(alpha=1.0, power=1.0, epsilon=1.0), seeds=5)
    q = np.asarray(found.q)
    np.testing.assert_allclose(q[:, 1, 3], 10.0, rtol=1e-6)
    np.testing.assert_allclose(q[:, 4, 3], -10.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "tau"),
    [
        ({}, 1.0),
        ({"train_frequency": 20, "gradient_steps": 2, "target_frequency": 20, "double": True, "huber": 5.0}, 0.05),
    ],
    ids=["plain", "double, Huber loss, Polyak-averaged target"],
)
def test_dqn_finds_the_optimal_values(changes, tau):
    env = make_maze(start=None)
    sizes = dqn.Sizes(30_000, target_frequency=200, learning_starts=1000, batch_size=64)
    sizes = sizes._replace(**changes)
    train = jax.jit(dqn.make_train(env, sizes))
    hyper = jax.tree.map(jnp.float32, dqn.Hyperparams(1e-3, GAMMA, final_epsilon=1.0, tau=tau))
    params, _ = train(dqn.init_params(env, jax.random.key(0), (32, 32)), jax.random.key(1), hyper)
    q = np.asarray(mlp.q_values(params, jnp.eye(6)))
    assert np.abs(q - TRUTH)[INSIDE].max() < 0.3
    assert optimal(q[None]).all()
