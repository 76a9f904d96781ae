"""TD errors: their gradient, their fixed points. Their values are those of rlax (tests/golden/estimation.py)."""

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops import q_learning

# Two states, two actions: a moves to the other state for 0, b stays for REWARD.
GAMMA, REWARD = 0.9, np.array([1.0, 2.0])
S, A = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
NEXT = np.array([1, 0, 0, 1])
PAID = np.array([0.0, REWARD[0], 0.0, REWARD[1]])


def solve(policy):
    """Q of a policy [S A] by linear algebra."""
    M = np.eye(4)
    for i in range(4):
        for a in range(2):
            M[i, 2 * NEXT[i] + a] -= GAMMA * policy[NEXT[i], a]
    return np.linalg.solve(M, PAID).reshape(2, 2)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def errors(function, q, *more):
    q = f32(q)
    return function(q[S], jnp.asarray(A), f32(PAID), f32(np.full(4, GAMMA)), q[NEXT], *more)


def test_the_errors_vanish_at_the_values_they_learn():
    best = solve(np.array([[1.0, 0.0], [0.0, 1.0]]))  # stay where 2 is paid, or go there
    np.testing.assert_array_equal(best.argmax(axis=1), [0, 1])
    np.testing.assert_allclose(errors(q_learning.q_learning, best), 0.0, atol=1e-5)
    np.testing.assert_allclose(errors(q_learning.double_q_learning, best, f32(best)[NEXT]), 0.0, atol=1e-5)
    policy = np.array([[0.3, 0.7], [0.6, 0.4]])
    q = solve(policy)
    np.testing.assert_allclose(errors(q_learning.expected_sarsa, q, f32(policy)[NEXT]), 0.0, atol=1e-5)
    by_action = [errors(q_learning.sarsa, q, jnp.full(4, a)) for a in range(2)]
    np.testing.assert_allclose(sum(policy[NEXT, a] * by_action[a] for a in range(2)), 0.0, atol=1e-5)
    assert np.abs(errors(q_learning.q_learning, q)).max() > 0.1


def test_the_target_is_a_constant_and_only_the_chosen_action_is_corrected():
    q = f32([[1.0, 2.0]])
    one, selector = f32([1.0]), f32([[0.0, 1.0]])
    for function, more in [
        (q_learning.q_learning, ()),
        (q_learning.sarsa, (jnp.array([1]),)),
        (q_learning.expected_sarsa, (f32([[0.5, 0.5]]),)),
        (q_learning.double_q_learning, (selector,)),
    ]:
        slopes = jax.grad(lambda q, n, f=function, m=more: f(q, jnp.array([0]), one, one, n, *m).sum(), (0, 1))(q, q)
        np.testing.assert_array_equal(slopes[0], [[-1.0, 0.0]])
        np.testing.assert_array_equal(slopes[1], [[0.0, 0.0]])


def test_leading_axes_are_free_and_may_be_none():
    draw = np.random.default_rng(0)
    q, following = f32(draw.normal(size=(2, 3, 4, 5)))
    actions, rewards, gamma = draw.integers(5, size=(3, 4)), f32(draw.normal(size=(3, 4))), f32(draw.random((3, 4)))
    whole = q_learning.q_learning(q, jnp.asarray(actions), rewards, gamma, following)
    one = q_learning.q_learning(q[1, 2], jnp.asarray(actions[1, 2]), rewards[1, 2], gamma[1, 2], following[1, 2])
    assert whole.shape == (3, 4)
    np.testing.assert_allclose(whole[1, 2], one, rtol=1e-5)


def test_targets_by_hand():
    """Q(s, 0) = 0.5, r = 1, γ = 0.9; next Q = (3, 5, 4), the selector likes the first, π = (0.2, 0.3, 0.5)."""
    q, action, reward, gamma = f32([0.5, 7.0, 7.0]), jnp.asarray(0), f32(1.0), f32(0.9)
    following, selector, policy = f32([3.0, 5.0, 4.0]), f32([9.0, 1.0, 2.0]), f32([0.2, 0.3, 0.5])
    want = {
        q_learning.q_learning: (5.0, ()),
        q_learning.double_q_learning: (3.0, (selector,)),
        q_learning.sarsa: (4.0, (jnp.asarray(2),)),
        q_learning.expected_sarsa: (4.1, (policy,)),
    }
    for function, (value, more) in want.items():
        got = function(q, action, reward, gamma, following, *more)
        np.testing.assert_allclose(got, 1.0 + 0.9 * value - 0.5, rtol=1e-6)


def test_huber_is_a_square_and_then_a_line():
    error = f32([-3.0, -0.5, 0.0, 1.0, 2.5])
    np.testing.assert_allclose(q_learning.huber(error), [2.5, 0.125, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(q_learning.huber(error, 2.0), [4.0, 0.125, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(jax.vmap(jax.grad(q_learning.huber))(error), [-1.0, -0.5, 0.0, 1.0, 1.0])
