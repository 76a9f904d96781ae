"""Advantages and rewards made of outcomes and lengths, against the papers' equations in loops over numpy's float64."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.algorithms.reinforce import no_baseline
from rljax.types import PolicyOutput, Trajectory, Unpaired

B = 9
T = 5
draw = np.random.default_rng(8)
LENGTHS = np.array([3, 5, 1, 2, 4, 0, 5, 2, 4])
GROUP = np.array([2, 2, 7, 2, 7, 7, 2, 7, 7])
REWARD = np.array([1.0, 0.0, 1.0, np.nan, 0.0, 5.0, 1.0, -0.5, 1.0])  # row 3 has no verdict, row 5 no decision
VALID = np.array([True, True, True, False, True, False, True, True, True])
MASK = np.arange(T) < LENGTHS[:, None]
PROCESS, REFERENCE = np.log(draw.uniform(0.1, 0.9, (2, B, T)))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def rollout(reward=REWARD):
    rewards = np.zeros((B, T))
    for b in np.flatnonzero(LENGTHS):
        rewards[b, LENGTHS[b] - 1] = reward[b]
    facts = {"logp": REFERENCE, "rewards": rewards, "teacher_logp": PROCESS, "ref_logp": REFERENCE}
    facts = {name: jnp.asarray(x) for name, x in facts.items()}
    nothing = jnp.zeros((B, T), jnp.int32)
    return Trajectory(inputs=nothing, actions=nothing, mask=jnp.asarray(MASK), group=jnp.asarray(GROUP), **facts)


def mates(b):
    return [j for j in range(B) if GROUP[j] == GROUP[b] and VALID[j]]


def agrees(batch, want, kept=VALID):
    """That the batch has these advantages [B] or [B T] on the decisions of the kept rows, and no others."""
    want = np.broadcast_to(want if np.ndim(want) == 2 else np.asarray(want)[:, None], (B, T))
    mask = MASK & kept[:, None]
    np.testing.assert_array_equal(batch.mask, mask)
    np.testing.assert_allclose(batch.advantages, np.where(mask, want, 0.0), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the selectors


def test_raft_keeps_the_first_of_the_best_completions_of_each_prompt():
    agrees(a.raft().credit(rollout(), {}), np.ones(B), kept=np.isin(np.arange(B), [0, 2]))
    all_wrong = np.where(GROUP == 7, -1.0 - np.arange(B), REWARD)
    agrees(a.raft().credit(rollout(all_wrong), {}), np.ones(B), kept=np.isin(np.arange(B), [0, 2]))
    ranked = np.where(GROUP == 2, np.arange(B), REWARD)
    agrees(a.raft().credit(rollout(ranked), {}), np.ones(B), kept=np.isin(np.arange(B), [2, 6]))


def test_rft_keeps_every_correct_completion_and_its_mean_counts_no_other():
    kept = np.isin(np.arange(B), [0, 2, 6, 8])
    agrees(a.rft().credit(rollout(), {}), np.ones(B), kept)
    agrees(a.rft(above=-1.0).credit(rollout(), {}), np.ones(B), VALID)
    batch = a.rft().credit(rollout(), {})
    np.testing.assert_allclose(a.rft().weights(batch.mask).max(), 1 / LENGTHS[kept].sum())


@pytest.mark.parametrize(
    ("algorithm", "correct", "incorrect"), [(a.psr(), 1.0, 0.0), (a.nsr(), 0.0, -1.0), (a.w_reinforce(), 0.1, -1.0)]
)
def test_positive_and_negative_samples_are_weighted_and_both_counted(algorithm, correct, incorrect):
    agrees(algorithm.credit(rollout(), {}), np.where(REWARD > 0, correct, incorrect))
    signs = np.where(REWARD > 0, 1.0, -1.0)
    agrees(algorithm.credit(rollout(np.where(VALID, signs, np.nan)), {}), np.where(signs > 0, correct, incorrect))


def test_what_is_correct_is_the_first_score_not_the_sum_of_rewards():
    """A wrong completion that is paid for its form is none to imitate, a right one with a penalty is."""
    paid = np.where(REWARD > 0, -0.5, 0.1)
    traj = rollout(np.where(VALID, paid, np.nan)).replace(scores=jnp.asarray(np.stack([REWARD, 1.0 - REWARD], axis=1)))
    for make in (a.rft, a.psr, a.nsr, a.w_reinforce, lambda: a.pass_at_k_training(2)):
        want = make().credit(rollout(), {})
        got = make().credit(traj, {})
        np.testing.assert_array_equal(got.mask, want.mask)
        np.testing.assert_array_equal(got.advantages, want.advantages)
    for k, taught in {2: np.ones(B), 3: GROUP == 7}.items():
        np.testing.assert_array_equal(a.pass_at_k_training(k).group_signal(traj), taught)
    alike = traj.replace(scores=jnp.ones_like(traj.scores))  # all are correct, and are paid differently
    assert not a.pass_at_k_training(2).group_signal(alike).any()
    longer = a.group_length_reward(a.reinforce(no_baseline), 0.7)
    added = longer.credit(traj, {}).advantages - np.where(VALID, paid, 0.0)[:, None]
    plain = longer.credit(rollout(), {}).advantages - np.where(VALID, REWARD, 0.0)[:, None]
    np.testing.assert_allclose(np.where(traj.mask, added, 0.0), np.where(traj.mask, plain, 0.0), atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- pass@k


def over_subsets(k):
    """Of each row: the mean, over the subsets of k with the row in them, of the subset's standardized reward."""
    want = np.zeros(B)
    for b in np.flatnonzero(VALID):
        subsets = list(combinations(mates(b), k))
        best = np.array([float(max(REWARD[j] for j in subset) > 0) for subset in subsets])
        if len(best) and best.std() > 0:
            own = [b in subset for subset in subsets]
            want[b] = ((best - best.mean()) / best.std())[own].mean()
    return want


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_advantages_are_those_of_all_subsets(k):
    """Groups of 3, two of them correct, and of 4, two of them correct."""
    want = over_subsets(k)
    assert want.any() == (k <= 2)
    algorithm = a.pass_at_k_training(k)
    agrees(algorithm.credit(rollout(), {}), want)
    assert algorithm.least_group == k + 1  # of k there is one subset


# ---------------------------------------------------------------------------------------------------------------- PRIME


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_prime_adds_the_returns_of_process_and_outcome_each_with_its_baseline(gamma):
    ratings = 0.3 * (PROCESS - REFERENCE)
    means = np.array([ratings[b, MASK[b]].mean() if MASK[b].any() else np.nan for b in range(B)])
    want = np.zeros((B, T))
    for b in np.flatnonzero(VALID):
        others = [j for j in mates(b) if j != b]
        outcome = REWARD[b] - REWARD[others].mean()
        for t in range(LENGTHS[b]):
            ahead = [gamma ** (s - t) * (ratings[b, s] - means[others].mean()) for s in range(t, LENGTHS[b])]
            want[b, t] = sum(ahead) + outcome
    agrees(a.prime(0.3, gamma).credit(rollout(), {}), want)


def test_the_implicit_reward_model_is_a_classifier_of_outcomes():
    def policy(params, frozen, traj):
        return PolicyOutput(logp=params)

    correct = REWARD > 0
    objective = a.implicit_prm(policy, 0.3)
    batch = objective.prepare(jnp.asarray(PROCESS), {}, Unpaired(rollout(), jnp.asarray(correct)), None)
    (value, _), slope = jax.value_and_grad(objective.loss, has_aux=True)(jnp.asarray(PROCESS), {}, batch)
    present = LENGTHS > 0
    total = np.where(MASK, 0.3 * (PROCESS - REFERENCE), 0.0).sum(1)
    chance = 1 / (1 + np.exp(-total))
    want = -np.where(correct, np.log(chance), np.log(1 - chance))[present].mean()
    np.testing.assert_allclose(value, want, rtol=1e-12)
    by_total = np.where(present, chance - correct, 0.0) / present.sum()
    np.testing.assert_allclose(slope, np.where(MASK, 0.3 * by_total[:, None], 0.0), rtol=1e-10, atol=1e-15)


# ------------------------------------------------------------------------------------------------------ length rewards


def exact_length(b):
    return REWARD[b] - 0.1 * abs(3 - LENGTHS[b])


def length_limit(b):
    return REWARD[b] * min(max(0.4 * (2 - LENGTHS[b]) + 0.5, 0.0), 1.0)


def group_length(b):
    lengths = LENGTHS[mates(b)]
    reward = 0.5 - (LENGTHS[b] - lengths.min()) / (lengths.max() - lengths.min())
    return REWARD[b] + 0.7 * (reward if REWARD[b] > 0 else min(0.0, reward))


def cosine(b):
    if LENGTHS[b] >= 5:
        return -3.0
    first, last = (2.0, 1.0) if REWARD[b] > 0 else (-10.0, 0.0)
    return last + 0.5 * (first - last) * (1 + np.cos(np.pi * LENGTHS[b] / 5))


@pytest.mark.parametrize(
    ("wrap", "shaped"),
    [
        (lambda x: a.lcpo_exact(x, 3, 0.1), exact_length),
        (lambda x: a.lcpo_max(x, 2, 0.4), length_limit),
        (lambda x: a.group_length_reward(x, 0.7), group_length),
        (lambda x: a.cosine_length_reward(x, 5, exceeded=-3.0), cosine),
    ],
    ids=["exact", "limit", "group", "cosine"],
)
def test_a_length_reward_changes_the_outcome_and_leaves_what_was_not_judged(wrap, shaped):
    want = [shaped(b) if VALID[b] else 0.0 for b in range(B)]
    agrees(wrap(a.reinforce(lambda rewards, group, valid: 0.0 * rewards)).credit(rollout(), {}), want)


def test_the_weight_of_the_group_length_reward_may_be_the_training_states():
    algorithm = a.group_length_reward(a.reinforce(lambda rewards, group, valid: 0.0 * rewards), 3.0)
    without = algorithm.credit(rollout(), {"length": jnp.float64(0.0)})
    agrees(without, np.where(VALID, REWARD, 0.0))


def test_completions_of_one_length_get_no_group_length_reward():
    traj = rollout()
    traj = traj.replace(
        mask=jnp.asarray(MASK & (np.arange(T) < 1)), rewards=jnp.asarray(np.eye(1, T) * REWARD[:, None])
    )
    plain, shaped = (x.credit(traj, {}).advantages for x in (a.dr_grpo(1.0), a.group_length_reward(a.dr_grpo(1.0))))
    np.testing.assert_array_equal(shaped, plain)
