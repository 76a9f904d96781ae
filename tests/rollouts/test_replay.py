import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.rollouts.replay import add_to_buffer, init_buffer, sample_from_buffer, transitions
from rljax.types import Trajectory


def test_a_ring_keeps_the_newest():
    buffer = init_buffer({"x": jax.ShapeDtypeStruct((2,), jnp.float32)}, 6)
    for start in (0, 3, 6):
        rows = jnp.arange(start, start + 3, dtype=jnp.float32)
        buffer = jax.jit(add_to_buffer)(buffer, {"x": jnp.stack([rows, -rows], axis=1)})
    assert sorted(buffer.rows["x"][:, 0].tolist()) == [3, 4, 5, 6, 7, 8]
    assert int(buffer.written) == 9
    with pytest.raises(ValueError, match="4 rows at a time do not divide a replay buffer of 6"):
        add_to_buffer(buffer, {"x": jnp.zeros((4, 2))})


def test_only_what_is_there_is_drawn_and_all_of_it_alike():
    buffer = init_buffer(jax.ShapeDtypeStruct((), jnp.float32), 100)
    buffer = add_to_buffer(buffer, jnp.arange(1.0, 5.0))
    drawn = np.asarray(sample_from_buffer(buffer, jax.random.bits(jax.random.key(0), (40_000,))))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(counts, 10_000, atol=450)  # five standard deviations


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_n_step_transitions_are_those_of_a_loop(n):
    rng = np.random.default_rng(0)
    N, T, gamma = 3, 7, 0.9
    terminated = rng.random((N, T)) < 0.2
    facts = {
        "inputs": rng.normal(size=(N, T, 2)),
        "next_inputs": rng.normal(size=(N, T, 2)),
        "actions": rng.integers(0, 4, (N, T)),
        "rewards": rng.normal(size=(N, T)),
        "logp": np.zeros((N, T)),
        "mask": np.ones((N, T), bool),
        "terminated": terminated,
        "truncated": ~terminated & (rng.random((N, T)) < 0.2),
    }
    found = transitions(Trajectory(**jax.tree.map(jnp.asarray, facts)), gamma, n)
    row = 0
    for i in range(N):
        for t in range(T):
            reward, last = 0.0, t
            for k in range(n):
                last = t + k
                reward += gamma**k * facts["rewards"][i, last]
                if terminated[i, last] or facts["truncated"][i, last] or last + 1 == T:
                    break
            np.testing.assert_allclose(found.reward[row], reward, rtol=1e-5)
            expected = 0.0 if terminated[i, last] else gamma ** (last - t + 1)
            np.testing.assert_allclose(found.discount[row], expected, rtol=1e-6)
            np.testing.assert_allclose(found.next_observation[row], facts["next_inputs"][i, last], rtol=1e-6)
            np.testing.assert_allclose(found.observation[row], facts["inputs"][i, t], rtol=1e-6)
            assert int(found.action[row]) == facts["actions"][i, t]
            row += 1


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_bootstrapped_from_columns_after_the_end(n):
    """A row of two decisions and three columns that the mask leaves out, whose contents are garbage."""
    garbage = jnp.array([[1.0, 2.0, 50.0, 60.0, 70.0]])
    traj = Trajectory(
        inputs=garbage[..., None],
        next_inputs=garbage[..., None] + 1,
        actions=jnp.zeros((1, 5), int),
        rewards=garbage,
        logp=jnp.zeros((1, 5)),
        mask=jnp.array([[True, True, False, False, False]]),
        terminated=jnp.zeros((1, 5), bool),
        truncated=jnp.array([[False, True, False, False, False]]),
    )
    found = transitions(traj, 0.5, n)
    first = (1.0, 0.5) if n == 1 else (2.0, 0.25)
    np.testing.assert_array_equal(found.reward, [first[0], 2.0, 0, 0, 0])
    np.testing.assert_array_equal(found.discount, [first[1], 0.5, 0, 0, 0])
    np.testing.assert_array_equal(found.weight, [1, 1, 0, 0, 0])


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="n >= 1, not 0"):
        transitions(Trajectory(None, None, None, None), 0.9, 0)
