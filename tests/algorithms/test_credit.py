"""Credit and wrappers: exact expectations, what counts as judged, coefficients that change while training."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.algorithms import (
    clip_reward,
    dapo,
    filter_overlong,
    gdpo,
    grpo,
    grpo_process,
    kl_in_reward,
    missing_eos_penalty,
    ppo,
    preference_over,
    reinforce,
    reinforce_ada,
    rloo,
    truncate_is,
    whiten_rewards,
    with_entropy,
    with_kl,
)
from rljax.algorithms.common.corrections import staleness_filter
from rljax.algorithms.common.credit import outcome_rewards
from rljax.algorithms.dynamic_sampling import dynamic_sampling, filter_groups
from rljax.algorithms.reinforce import group_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.algorithms.reinforce_ada import balanced_subsample
from rljax.ops import kl
from rljax.ops.weights import token_mean
from rljax.types import Batch, PolicyOutput, Trajectory
from tests.algorithms.tiny import ALGORITHMS, agree, credited, kinds_by_day, learn, rollout, table_params, take_rows
from tests.ops.golden import close


def bandit(actions, rewards, group):
    shape = actions.shape
    zeros = jnp.zeros(shape)
    return Trajectory(
        inputs=jnp.zeros(shape, jnp.int32),
        actions=jnp.asarray(actions),
        logp=zeros,
        mask=jnp.ones(shape, bool),
        rewards=jnp.float32(rewards),
        group=jnp.asarray(group),
    )


@pytest.mark.parametrize(
    ("baseline", "shrunk"), [(no_baseline, 1.0), (leave_one_out_baseline, 1.0), (group_mean_baseline, 2 / 3)]
)
def test_the_expected_gradient_over_all_groups_of_three_is_that_of_the_expected_reward(baseline, shrunk):
    """27 groups of three answers out of three, each weighted by its probability: no sampling error."""
    p, reward = np.array([0.5, 0.3, 0.2]), np.array([1.0, -2.0, 4.0])
    groups = np.array(list(itertools.product(range(3), repeat=3)))
    chance = p[groups].prod(axis=1)
    batch = reinforce(baseline).credit(
        bandit(groups.reshape(-1, 1), reward[groups].reshape(-1, 1), np.repeat(np.arange(27), 3)), {}
    )
    score = np.eye(3)[groups] - p  # ∇ log π by the logits
    advantages = np.float64(batch.advantages).reshape(27, 3, 1)
    got = (chance[:, None] * (advantages * score).mean(axis=1)).sum(axis=0)
    close(got, shrunk * p * (reward - p @ reward), atol=1e-5)


def test_a_row_is_judged_if_it_has_decisions_and_each_has_a_number():
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)
    rewards = jnp.array([[1.0, 2.0, jnp.nan], [jnp.nan, 5.0, 5.0], [7.0, 7.0, 7.0], [9.0, 0.5, -1.0]])
    traj = bandit(np.zeros((4, 3), int), rewards, np.zeros(4, int)).replace(mask=mask)
    total, judged = outcome_rewards(traj)
    np.testing.assert_array_equal(total, [3.0, 0.0, 0.0, -0.5])
    np.testing.assert_array_equal(judged, [True, False, False, True])
    batch = grpo().credit(traj, {})
    np.testing.assert_array_equal(batch.mask, mask & judged[:, None])
    np.testing.assert_array_equal(batch.traj.mask, mask)  # facts stay


def test_credit_hands_the_coefficients_on():
    for algorithm in ALGORITHMS.values():
        assert algorithm.credit(rollout(), {"kl": jnp.float32(3)}).coefficients == {"kl": 3}


def test_gdpo_keeps_groups_that_differ_in_a_component():
    """Of three groups of two the first differs in neither score, the second in both, whose sum is the same, and the
    third in one that is recorded only.
    """
    scores = jnp.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    group = np.repeat([0, 1, 2], 2)
    for weights, want in {(1.0, 1.0): [2, 3, 4, 5, 0, 1], (1.0, 0.0): [2, 3, 0, 1, 4, 5]}.items():
        traj = bandit(np.arange(6).reshape(6, 1), scores @ jnp.array(weights)[:, None], group)
        traj = traj.replace(scores=scores, reward_weights=jnp.broadcast_to(jnp.array(weights), scores.shape))
        kept = dynamic_sampling(traj, 6, gdpo().group_signal)
        np.testing.assert_array_equal(kept.actions[:, 0], want)
    by_argument = gdpo((1.0, 0.0)).credit(traj, {}).advantages
    np.testing.assert_array_equal(gdpo().credit(traj, {}).advantages, by_argument)
    with pytest.raises(ValueError, match="reward_weights"):
        gdpo().credit(traj.replace(reward_weights=None), {})


def test_groups_whose_answers_differ_are_kept_first_and_whole():
    """Groups of two: 5 and 3 differ; in 8 one answer was not judged; 1 and 4 are all right, to the last bit."""
    group = np.array([5, 8, 1, 3, 4, 5, 1, 8, 4, 3])
    reward = np.array([1.0, 0.0, 0.1, 0.0, 0.7, 0.0, 0.1, np.nan, 0.7, 0.5])
    traj = bandit(np.arange(10).reshape(10, 1), reward[:, None], group)
    for rows, want in {4: [3, 9, 0, 5], 6: [3, 9, 0, 5, 2, 6]}.items():
        kept = dynamic_sampling(traj, rows)
        np.testing.assert_array_equal(kept.actions[:, 0], want)
        np.testing.assert_array_equal(kept.group, group[want])
        np.testing.assert_array_equal(kept.rewards[:, 0], np.float32(reward[want]))


def test_decisions_of_old_policies_are_left_out():
    """Version 7 now: at most two versions old are 5, 6 and 7. What the policy did not choose stays out."""
    traj = bandit(np.zeros((2, 4), int), np.ones((2, 4)), np.zeros(2, int))
    traj = traj.replace(
        version=jnp.array([[3, 4, 5, 7], [6, 0, 5, 4]]), mask=jnp.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool)
    )
    filtered = staleness_filter(grpo(), 2)
    batch = filtered.credit(traj, {"version": jnp.int32(7)})
    np.testing.assert_array_equal(batch.mask, [[False, False, True, True], [False, False, True, False]])
    np.testing.assert_array_equal(batch.traj.mask, traj.mask)
    with pytest.raises(ValueError, match="present version"):
        filtered.credit(traj, {})
    with pytest.raises(ValueError, match="version"):
        filtered.credit(traj.replace(version=None), {"version": jnp.int32(7)})


def test_critic_targets_are_the_lambda_returns_before_whitening():
    """One decision that ends its episode: target = reward, whatever the old values."""
    rewards = np.array([[1.0], [2.0], [6.0]])
    traj = bandit(np.zeros((3, 1), int), rewards, np.arange(3))
    traj = traj.replace(values=jnp.array([[0.5, 9.0], [0.0, 9.0], [-1.0, 9.0]]), terminated=jnp.ones((3, 1), bool))
    batch = ppo().credit(traj, {})
    close(batch.returns, rewards)
    raw = rewards - np.asarray(traj.values[:, :1])
    close(batch.advantages, (raw - raw.mean()) / raw.std(ddof=1))


def one_decision(logp, **facts):
    cell = {name: jnp.full((1, 1), value) for name, value in facts.items()}
    traj = bandit(np.zeros((1, 1), int), [[0.0]], [0]).replace(logp=jnp.full((1, 1), logp), **cell)
    return Batch(traj=traj, advantages=jnp.zeros((1, 1)), mask=traj.mask)


@pytest.mark.parametrize("estimator", [kl.k2, kl.k3, kl.k3_with_k2_gradient])
def test_with_kl_adds_the_estimate_and_logs_it(estimator):
    algorithm = with_kl(grpo(), 0.5, estimator)
    terms, metrics = algorithm.loss(PolicyOutput(logp=jnp.full((1, 1), -1.0)), one_decision(-1.0, ref_logp=-3.0))
    want = {kl.k2: 2.0}.get(estimator, np.exp(-2.0) - 1 + 2)
    close(metrics["kl"], [[want]])
    close(terms, [[0.5 * want]])
    assert "clip_fraction" in metrics
    assert algorithm.needs == ("ref_logp",)


def test_with_entropy_subtracts_it_and_logs_it():
    output = PolicyOutput(logp=jnp.full((1, 1), -1.0), entropy=jnp.full((1, 1), 1.5))
    terms, metrics = with_entropy(grpo(), 0.1).loss(output, one_decision(-1.0))
    close(terms, [[-0.15]])
    close(metrics["entropy"], [[1.5]])


def test_the_training_states_coefficient_holds_over_the_given_one():
    params, traj = table_params(), rollout()

    def gradient(given, coefficients):
        algorithm = with_entropy(with_kl(grpo(), given), given)
        return learn(algorithm, algorithm.credit(traj, coefficients), params)[0]

    held = {"kl": jnp.float32(0.3), "entropy": jnp.float32(0.3)}
    agree(gradient(7.0, held), gradient(0.3, {}))
    assert np.abs(gradient(7.0, {})["table"] - gradient(0.3, {})["table"]).max() > 0.01


def test_kl_in_loss_and_kl_in_reward_have_coefficients_of_their_own():
    traj = rollout()
    algorithm = kl_in_reward(with_kl(grpo(), 0.1), 0.2)

    def credited_with(coefficients):
        return np.asarray(algorithm.credit(traj, coefficients).advantages)

    plain = credited_with({})
    np.testing.assert_array_equal(credited_with({"kl": jnp.float32(5.0)}), plain)
    assert np.nanmax(np.abs(credited_with({"kl_reward": jnp.float32(5.0)}) - plain)) > 0.1


def test_rewards_of_rlhf_by_hand():
    """Three completions, the last without a verdict: EOS penalty, clip, KL and whitening in this order."""
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    rewards = np.array([[0, 0, 3.0, 9], [0, 2.0, 9, 9], [0, 0, 0, np.nan]])
    logp = -np.arange(1.0, 13).reshape(3, 4)
    ref_logp = logp - np.linspace(-0.5, 0.5, 12).reshape(3, 4)
    ended = np.zeros((3, 4), bool)
    ended[0, 2] = True
    fields = {"rewards": rewards, "ref_logp": ref_logp, "terminated": ended}
    traj = Trajectory(inputs=mask, actions=mask, logp=jnp.asarray(logp), mask=jnp.asarray(mask))
    traj = traj.replace(**{name: jnp.asarray(x) for name, x in fields.items()})

    seen = grpo()._replace(credit=lambda traj, coefficients: traj.rewards)
    algorithm = missing_eos_penalty(clip_reward(kl_in_reward(whiten_rewards(seen), 0.1), 2.5), 1.5)
    got = np.asarray(algorithm.credit(traj, {}))

    want = np.where(mask, -0.1 * (logp - ref_logp), 0.0)
    want[0, 2] += 2.5
    want[1, 1] += 0.5
    inside = mask & np.array([[True], [True], [False]])
    values = want[inside]
    whitened = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8) + values.mean()
    np.testing.assert_allclose(got[inside], whitened, rtol=1e-5)
    assert np.isnan(got[2]).any()


def test_what_is_preferred_to_an_opponent():
    mask = jnp.array([[True, True, False], [True, True, True], [True, False, False]])
    own = Trajectory(inputs=mask, actions=mask, logp=jnp.zeros((3, 3)), mask=mask)
    own = own.replace(rewards=jnp.array([[0.0, 2.0, 5.0], [0.0, 0.0, 1.0], [jnp.nan, 0.0, 0.0]]))
    other = own.replace(rewards=jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    got = np.asarray(preference_over(own, other))
    np.testing.assert_allclose(got[0], [0, 1 / (1 + np.exp(-1.0)), 0], rtol=1e-5)
    np.testing.assert_allclose(got[1], [0, 0, 0.5], rtol=1e-5)
    assert np.isnan(got[2, 0])


def test_wrappers_add_what_they_need_once_and_keep_the_rest():
    assert with_kl(with_kl(ppo())).needs == ("values", "ref_logp")
    assert with_entropy(grpo()).needs == ()
    assert with_kl(ppo()).credit is not None
    assert with_kl(grpo()).weights is grpo().weights


def test_k1_in_a_loss_is_refused_in_words():
    with pytest.raises(ValueError, match="no gradient on average; take k3_with_k2_gradient, k2 or k3"):
        with_kl(grpo(), 0.1, kl.k1)


def test_reinforce_ada_keeps_right_and_wrong_answers_in_equal_parts():
    """Two prompts of five answers: two right of four judged, and one right; three are kept of each."""
    group = np.array([7, 3, 7, 3, 7, 3, 7, 3, 7, 3])
    reward = np.array([1.0, 0, 0, 0, 0, 1, 1, 0, np.nan, 0])
    traj = bandit(np.zeros((10, 1), int), reward[:, None], group)
    kept = balanced_subsample(traj, drawn=5, kept=3)
    found = {g: sorted(np.asarray(kept.rewards[kept.group == g, 0])) for g in (3, 7)}
    assert found[3] == [0, 0, 1]  # one right answer is all there is
    assert found[7] in ([0, 0, 1], [0, 1, 1])
    np.testing.assert_allclose(kept.baseline, np.where(kept.group == 7, 0.5, 0.2), rtol=1e-6)
    np.testing.assert_allclose(
        reinforce_ada().credit(kept, {}).advantages[:, 0], kept.rewards[:, 0] - kept.baseline, rtol=1e-6
    )
    everything = balanced_subsample(traj, drawn=5, kept=5)
    assert np.isnan(everything.rewards[everything.group == 7, 0][-1])  # not judged: taken last
    with pytest.raises(ValueError, match="not groups of 4"):
        balanced_subsample(traj, drawn=4, kept=2)


CHANGES = {  # wrappers that change the rewards
    "kl_in_reward": kl_in_reward,
    "missing_eos_penalty": a.missing_eos_penalty,
    "clip_reward": a.clip_reward,
    "whiten_rewards": a.whiten_rewards,
    "overlong_penalty": lambda x: a.overlong_penalty(x, 8, 2),
    "lcpo_exact": lambda x: a.lcpo_exact(x, 3),
    "lcpo_max": lambda x: a.lcpo_max(x, 3),
    "group_length_reward": a.group_length_reward,
    "cosine_length_reward": lambda x: a.cosine_length_reward(x, 5),
    "turn_groups": a.turn_groups,
}
SUMS_NOTHING = {
    **dict.fromkeys(("maxrl", "rft", "psr", "nsr", "w_reinforce", "pass_at_k_training"), "which completions are"),
    **dict.fromkeys(("grpo_process", "capo"), "rewards where steps end"),
    "gdpo": "each score by itself",
}


@pytest.mark.parametrize("wrapper", CHANGES)
def test_rewards_are_changed_for_methods_that_learn_from_their_sum(wrapper):
    assert {name for name, x in ALGORITHMS.items() if x.reads != "rewards"} == set(SUMS_NOTHING)
    for name, what in SUMS_NOTHING.items():
        with pytest.raises(ValueError, match=f"{wrapper} changes the rewards, and this method .*{what}.*; legal: "):
            CHANGES[wrapper](ALGORITHMS[name])
    CHANGES[wrapper](grpo())


def test_a_kl_makes_no_wrong_completion_right():
    """Four wrong completions, two of which get a reward above 0 by it."""
    nothing = jnp.zeros((4, 1))
    traj = bandit(np.zeros((4, 1), int), nothing, np.zeros(4, int)).replace(scores=nothing, ref_logp=nothing)
    traj = traj.replace(logp=jnp.array([[0.4], [-0.5], [0.3], [-0.3]]))
    assert np.asarray(kl_in_reward(grpo()).credit(traj, {}).advantages).any()
    for make in (a.rft, a.psr, a.pass_at_k_training):
        penalized = traj.replace(rewards=-0.05 * traj.logp)
        assert not np.asarray(make().credit(penalized, {}).advantages).any()


@pytest.mark.parametrize("correct", [truncate_is, a.mask_is, lambda x: a.normalized_is(x, token_mean)])
def test_the_sampler_is_corrected_for_once(correct):
    for algorithm in (a.topr(), a.off_policy_pg(), a.vtrace(), a.sft(), a.a_star_po(), correct(grpo())):
        with pytest.raises(ValueError, match=r"would correct twice: .*; legal: without it"):
            correct(algorithm)
    for algorithm in (a.real(), a.otb()):
        with pytest.raises(ValueError, match=r"does not correct this method .*; legal: samples of its own policy"):
            correct(algorithm)
    assert correct(with_kl(a.reject(grpo()))).off_policy == "itself"


@pytest.mark.parametrize("name", kinds_by_day(ALGORITHMS))
def test_a_group_of_the_least_size_teaches_something(name):
    algorithm = ALGORITHMS[name]
    traj = rollout()
    rows = np.flatnonzero(np.isfinite(traj.rewards.sum(axis=1)) & traj.mask.any(axis=1))[: 4 * algorithm.least_group]
    few = take_rows(traj, rows).replace(group=jnp.arange(len(rows)) // algorithm.least_group)
    few = few.replace(rewards=jnp.abs(few.rewards))  # MaxRL's are not below 0
    batch = credited(algorithm, few)
    assert np.asarray(jnp.where(batch.mask, batch.advantages, 0.0)).any()


LONE_KEEPS_ITS_REWARD = {  # a baseline of the others, of whom there are none
    *("reinforce, leave one out", "reinforce", "reinforce_to_go", "rloo", "prime", "trpo", "otb"),
    *("off_policy_pg", "off_policy_pg, by token", "rloo + kl in reward", "rloo + cosine length"),
}


@pytest.mark.parametrize("name", kinds_by_day(name for name, x in ALGORITHMS.items() if x.least_group > 1))
def test_a_smaller_group_teaches_nothing_or_has_no_baseline(name):
    """Whatever the other rows of the batch are."""
    algorithm = ALGORITHMS[name]
    traj = rollout()
    rows = np.flatnonzero(np.isfinite(traj.rewards.sum(axis=1)) & traj.mask.any(axis=1))
    rows = rows[: len(rows) // (algorithm.least_group - 1) * (algorithm.least_group - 1)]
    few = take_rows(traj, rows).replace(group=jnp.arange(len(rows)) // (algorithm.least_group - 1))
    batch = credited(algorithm, few)
    learned = np.asarray(jnp.where(batch.mask, batch.advantages, 0.0))
    if name in LONE_KEEPS_ITS_REWARD:
        assert learned.any()
    elif algorithm.reads != "steps" and name not in (
        "raft",
        "grpo + teacher",
    ):  # steps of one are compared; best of one
        np.testing.assert_allclose(learned, 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "field"),
    [
        (grpo(), "group"),
        (rloo(), "rewards"),
        (with_kl(grpo()), "ref_logp"),
        (truncate_is(grpo()), "old_logp"),
        (kl_in_reward(rloo()), "ref_logp"),
        (filter_overlong(grpo()), "truncated"),
        (ppo(), "values"),
    ],
)
def test_what_nobody_filled_is_named(algorithm, field):
    traj = rollout().replace(**{field: None})
    with pytest.raises(ValueError, match=rf"needs Trajectory.{field}"):
        algorithm.credit(traj, {})


def test_whoever_compares_completions_names_the_missing_group():
    alone = rollout().replace(group=None)
    compare = [algorithm.credit for algorithm in ALGORITHMS.values() if algorithm.least_group > 1]
    assert len(compare) > 20
    select = [a.online_pairs, lambda traj: balanced_subsample(traj, 8, 4)]
    select.append(lambda traj: dynamic_sampling(traj, 8, lambda traj: traj.mask.any(axis=1)))
    for function in [partial(credit, coefficients={}) for credit in compare] + select:
        with pytest.raises(ValueError, match=r"needs Trajectory\.group, which is None"):
            function(alone)


def test_process_grpo_loses_no_reward_on_a_token_that_ends_no_step():
    """An outcome on an unmarked last token is the reward of the last step; one inside a step is part of the step's."""
    mask = jnp.ones((2, 4), bool)
    rewards = jnp.array([[0.0, 1.0, 0.0, 3.0], [0.5, 1.5, 0.0, 0.0]])
    step_ends = jnp.zeros((2, 4), bool).at[:, 1].set(True)
    zeros = jnp.zeros((2, 4))
    traj = Trajectory(zeros, zeros, zeros, mask, group=jnp.zeros(2, int), rewards=rewards, step_ends=step_ends)
    got = grpo_process().credit(traj, {}).advantages
    steps = np.array([[1.0, 3.0], [2.0, 0.0]])
    z = (steps - steps.mean()) / (steps.std(ddof=1) + 1e-6)
    want = np.repeat(z[:, ::-1].cumsum(axis=1)[:, ::-1], 2, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [grpo, dapo, rloo, a.lite_ppo, a.gpg, a.maxrl, a.reinforce_pp_baseline, a.gspo, a.opo])
def test_without_groups_of_no_signal_the_update_is_that_of_the_others(make):
    """Their divisors and KL terms too: as if these rows had never been sampled."""
    traj = rollout()
    group = jnp.asarray(traj.group)
    flat = jnp.where((group == group[0])[:, None], 0.0, traj.rewards)  # all rows of one group have reward 0
    scores = jnp.where((group == group[0])[:, None], 0.0, traj.scores)
    traj = traj.replace(rewards=flat, scores=scores)
    algorithm = with_kl(make(), 0.3)
    with_signal = np.flatnonzero(np.asarray(algorithm.group_signal(traj)))
    assert 0 < len(with_signal) < len(group)
    others = jax.tree.map(lambda x: x[with_signal], traj)
    params = table_params()
    want, _ = learn(algorithm, algorithm.credit(others, {}), params)
    got, _ = learn(filter_groups(algorithm), filter_groups(algorithm).credit(traj, {}), params)
    agree(got, want)
    usual, _ = learn(algorithm, algorithm.credit(traj, {}), params)
    differences = jax.tree.map(lambda x, y: np.abs(x - y).max(), usual, got)
    assert max(jax.tree.leaves(differences)) > 1e-3


def test_a_batch_of_groups_without_signal_teaches_nothing_when_they_are_filtered():
    traj = rollout()
    traj = traj.replace(rewards=jnp.zeros_like(traj.rewards))
    algorithm = filter_groups(with_kl(grpo(), 0.3))
    gradient, metrics = learn(algorithm, algorithm.credit(traj, {}), table_params())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert metrics["loss"] == 0
    with pytest.raises(ValueError, match="filter_groups wants a method that compares completions of a prompt"):
        filter_groups(ppo())
