"""Credit by turns against loops over turns in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.types import Algorithm, Batch, Trajectory

B, T = 8, 14
GROUP = np.array([7, 3, 7, 3, 7, 3, 9, 7])


def conversations(seed: int) -> Trajectory:
    """Rows of one to four turns of one to three tokens, observations before and between them, a reward in each turn."""
    draw = np.random.default_rng(seed)
    mask, ends, terminated, truncated = np.zeros((4, B, T), bool)
    for b in range(B):
        t = int(draw.integers(0, 3))
        for _ in range(draw.integers(1, 5)):
            length = draw.integers(1, 4)
            if t + length > T:
                break
            mask[b, t : t + length] = True
            ends[b, t + length - 1] = True
            t += length + int(draw.integers(0, 3))
        last = np.flatnonzero(mask[b])[-1]
        (terminated if draw.random() < 0.5 else truncated)[b, last] = True
    garbage = np.where(mask, 0.0, np.nan)  # what masked columns hold is not read
    return Trajectory(
        inputs=np.zeros((B, T), np.int32),
        actions=np.zeros((B, T), np.int32),
        logp=np.float32(garbage),
        mask=mask,
        rewards=np.float32(np.where(ends, draw.normal(size=(B, T)), 0.0) + garbage),
        step_ends=ends,
        group=GROUP,
        values=np.float32(draw.normal(size=(B, T + 1)) * np.pad(mask, ((0, 0), (0, 1)))),
        terminated=terminated,
        truncated=truncated,
        final_values=np.float32(draw.normal(size=(B, T))),
    )


def credit(algorithm: Algorithm, traj: Trajectory) -> Batch:
    return algorithm.credit(jax.tree.map(jnp.asarray, traj), {})


def turns_of(traj: Trajectory, b: int) -> list[np.ndarray]:
    """The columns of each turn of row b."""
    own = np.flatnonzero(traj.mask[b])
    ends = np.flatnonzero(np.asarray(traj.step_ends)[b, own])
    return [columns for columns in np.split(own, ends + 1) if len(columns)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bootstraps", [False, True])
def test_gae_from_turn_to_turn(seed, bootstraps):
    gamma, lam = 0.8, 0.7
    traj = conversations(seed)
    traj = traj if bootstraps else traj.replace(final_values=None)
    want, targets = np.zeros((2, B, T))
    for b in range(B):
        advantage, following = 0.0, 0.0
        turns = turns_of(traj, b)
        for j, columns in reversed(list(enumerate(turns))):
            reward = np.float64(traj.rewards[b, columns]).sum()
            value = np.float64(traj.values[b, columns[0]])
            if j == len(turns) - 1 and bootstraps and traj.truncated[b, columns[-1]]:
                following = np.float64(traj.final_values[b, columns[-1]])
            advantage = reward + gamma * following - value + gamma * lam * advantage
            want[b, columns], targets[b, columns] = advantage, advantage + value
            following = value
    starts = np.zeros((B, T), bool)
    for b in range(B):
        starts[b, [columns[0] for columns in turns_of(traj, b)]] = True
    whitened = (want - want[starts].mean()) / np.sqrt(want[starts].var(ddof=1) + 1e-8)  # over turns, not tokens
    batch = credit(a.turn_level(a.ppo(gamma=gamma, lam=lam)), traj)
    np.testing.assert_array_equal(batch.mask, traj.mask)
    np.testing.assert_allclose(batch.returns, targets, atol=1e-5)
    np.testing.assert_allclose(batch.advantages, np.where(traj.mask, whitened, 0.0), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_turns_of_one_index_are_compared_in_their_group(seed, weight):
    gamma = 0.8
    traj = conversations(seed)
    to_go, total = {}, np.zeros(B)
    for b in range(B):
        rewards = [np.float64(traj.rewards[b, columns]).sum() for columns in turns_of(traj, b)]
        total[b] = sum(rewards)
        for j in range(len(rewards)):
            to_go[b, j] = sum(gamma**k * r for k, r in enumerate(rewards[j:]))

    def standardized(x, others):
        return (x - np.mean(others)) / (np.std(others, ddof=1) + 1e-6) if len(others) > 1 else 0.0

    want = np.zeros((B, T))
    for (b, j), value in to_go.items():
        mine = GROUP[b]
        others = [x for (c, i), x in to_go.items() if i == j and GROUP[c] == mine]
        whole = standardized(total[b], total[mine == GROUP])
        want[b, turns_of(traj, b)[j]] = standardized(value, others) + weight * whole
    batch = credit(a.turn_groups(a.grpo(), gamma, weight), traj)
    np.testing.assert_array_equal(batch.mask, traj.mask)
    np.testing.assert_allclose(batch.advantages, want, atol=2e-5)


@pytest.mark.parametrize("wrapped", [a.turn_level(a.ppo()), a.turn_groups(a.grpo()), a.turn_groups(a.rloo(), 0.9, 1.0)])
def test_a_conversation_with_a_turn_that_could_not_be_judged_leaves_the_batch(wrapped):
    traj = conversations(0)
    rewards = traj.rewards.copy()
    rewards[2, turns_of(traj, 2)[0][-1]] = np.nan
    batch = credit(wrapped, traj.replace(rewards=rewards))
    np.testing.assert_array_equal(batch.mask, traj.mask & (np.arange(B) != 2)[:, None])
    assert jnp.isfinite(batch.advantages).all()


def test_conversations_of_one_turn_are_completions():
    traj = conversations(1)
    traj = traj.replace(step_ends=np.zeros((B, T), bool), final_values=None)
    plain = credit(a.grpo(), traj)
    by_turn = credit(a.turn_groups(a.grpo()), traj)
    np.testing.assert_allclose(by_turn.advantages, plain.advantages, atol=1e-6)


def test_what_a_wrapped_algorithm_reads_besides_rewards_and_groups_is_an_error():
    with pytest.raises(ValueError, match="turn_groups changes the rewards, and this method reads each score"):
        a.turn_groups(a.gdpo((1.0,)))
    with pytest.raises(ValueError, match="step_ends"):
        credit(a.turn_level(a.ppo()), conversations(0).replace(step_ends=None))
