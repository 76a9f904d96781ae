"""Tabular control on the 2x3 maze, against its exact values: a hundred seeds, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from classical import dqn
from classical.tabular import Hyper, make_learn
from rljax.envs.maze import cell_index, make_maze, maze_mdp
from rljax.envs.tabular import action_values, optimal_action_values
from rljax.models import mlp

GAMMA, SEEDS = 0.9, 100
MAZE = make_maze(start=None, observe=cell_index)
MDP = maze_mdp(MAZE.params, GAMMA)
TRUTH = np.asarray(optimal_action_values(MDP))
INSIDE = [0, 1, 3, 4]  # where one chooses


def learn(rule, steps, hyper, truth=TRUTH, seeds=SEEDS):
    run = jax.jit(jax.vmap(make_learn(rule, MAZE, 6, steps), (0, None, None)))
    return run(jax.random.split(jax.random.key(0), seeds), jax.tree.map(jnp.float32, hyper), jnp.asarray(truth))


def optimal(q):
    """Whether acting greedily by q is optimal everywhere, one answer a seed."""
    chosen = np.argmax(q[:, INSIDE], axis=2)
    worth = np.take_along_axis(np.broadcast_to(TRUTH[INSIDE], q[:, INSIDE].shape), chosen[..., None], axis=2)[..., 0]
    return (worth > TRUTH[INSIDE].max(axis=1) - 1e-4).all(axis=1)


def test_q_learning_finds_the_optimal_values():
    found = learn("q_learning", 2000, Hyper(alpha=0.5, epsilon=1.0))
    assert (np.asarray(found.distance[:, -1]) < 1e-2).all()
    assert optimal(np.asarray(found.q)).all()
    path, cell = [], 0
    while cell in INSIDE and len(path) < 5:
        path.append(int(np.argmax(found.q[0, cell])))
        cell += (-3, 3, -1, 1)[path[-1]]
    assert (len(path), cell) == (2, 2)
    assert (found.visits.sum(axis=(1, 2)) == 2000).all()


def test_q_learning_by_its_own_policy_finds_an_optimal_one():
    found = learn("q_learning", 5000, Hyper(alpha=0.5, epsilon=0.3))
    assert optimal(np.asarray(found.q)).sum() >= 99


def test_double_q_learning_finds_the_optimal_values():
    found = learn("double_q", 5000, Hyper(alpha=0.5, epsilon=1.0))
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
    ("rule", "hyper", "bound"),
    [
        ("expected_sarsa", Hyper(alpha=0.5, epsilon=1.0), 1e-2),
        ("sarsa", Hyper(alpha=1.0, power=0.8, epsilon=1.0), 0.5),
        ("expected_sarsa", Hyper(alpha=1.0, power=0.6, epsilon=0.5), 1e-1),
    ],
    ids=["expected sarsa, random", "sarsa, random", "expected sarsa, on its policy"],
)
def test_sarsa_finds_the_values_of_its_own_policy(rule, hyper, bound):
    """Where steps shrink as N^-power, or the target is an expectation; SARSA's own draws a' and is coarser."""
    truth = epsilon_greedy_values(hyper.epsilon)
    found = learn(rule, 20_000, hyper, truth, seeds=20)
    distance = np.abs(np.asarray(found.q) - truth)[:, INSIDE]
    assert np.median(distance.max(axis=(1, 2))) < bound
    assert np.abs(np.asarray(found.q).mean(axis=0) - truth)[INSIDE].max() < bound


@pytest.mark.parametrize("rule", ["q_learning", "double_q"])
def test_a_step_of_one_over_n_averages(rule):
    """A step that ends the episode has one target, its reward: right after one visit, and later ones change nothing.

    Of each table; after 300 steps both have seen it.
    """
    found = learn(rule, 300, Hyper(alpha=1.0, power=1.0, epsilon=1.0), seeds=5)
    q = np.asarray(found.q)
    np.testing.assert_allclose(q[:, 1, 3], 10.0, rtol=1e-6)
    np.testing.assert_allclose(q[:, 4, 3], -10.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "share"),
    [({}, 1.0), ({"every": 20, "updates": 2, "target_every": 20, "double": True, "huber": 5.0}, 0.05)],
    ids=["plain", "double, clipped errors, a target that follows"],
)
def test_dqn_finds_the_optimal_values(changes, share):
    env = make_maze(start=None)
    sizes = dqn.Sizes(steps=30_000, rows=10, every=10, target_every=200, start=1000, capacity=10_000, batch=64)
    sizes = sizes._replace(**changes)
    train = jax.jit(dqn.make_train(env, sizes))
    hyper = jax.tree.map(jnp.float32, dqn.Hyper(1e-3, GAMMA, epsilon=1.0, share=share))
    params, _ = train(dqn.init(env, jax.random.key(0), (32, 32)), jax.random.key(1), hyper)
    q = np.asarray(mlp.q_values(params, jnp.eye(6)))
    assert np.abs(q - TRUTH)[INSIDE].max() < 0.3
    assert optimal(q[None]).all()
