"""Distillation by hand: the papers' equations in numpy, and the expected gradient of MiniLLM by enumeration."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms.gkd import gkd, mix_completions
from rljax.algorithms.minillm import minillm
from rljax.algorithms.sdft import sdft
from rljax.algorithms.sdpo import sdpo, successful_peers
from rljax.ops.distillation import full_vocabulary, sampled_token, top_k
from rljax.ops.weights import seq_mean_token_sum, token_mean, token_sum
from rljax.types import Distillation, Trajectory
from tests.algorithms.test_preferences import TEACHER, compare, learn, shown, taught
from tests.algorithms.tiny import V, rollout, table_params
from tests.ops.test_distillation import coarse, jsd, softmax

PRESENT = np.arange(16) != 3


def logits_of(traj, seen=None):
    """(student's, teacher's) logits at the temperature, in float64."""
    temperature = np.float64(traj.temperature)[..., None]
    own = np.float64(table_params()["table"])[traj.inputs] / temperature
    return own, np.float64(TEACHER)[traj.inputs if seen is None else seen] / temperature


def row_means(x, mask):
    return np.array([row[m].mean() for row, m in zip(x, mask, strict=True) if m.any()])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_averages_the_divergence_over_tokens_then_completions(beta):
    traj = rollout(0)
    student, teacher = logits_of(traj)
    divergence = jsd(softmax(teacher), softmax(student), beta)
    metrics = learn(gkd(compare, beta), taught())[1]
    assert metrics["loss"] == pytest.approx(row_means(divergence, np.asarray(traj.mask)).mean(), rel=1e-5)
    assert metrics["divergence"] == pytest.approx(divergence[traj.mask].mean(), rel=1e-5)


def test_trl_averages_it_over_all_tokens():
    """TRL's generalized_jsd_loss divides the sum by the tokens of the batch ("batchmean" with labels)."""
    traj = rollout(0)
    student, teacher = logits_of(traj)
    divergence = jsd(softmax(teacher), softmax(student), 0.5)
    metrics = learn(gkd(compare, 0.5, weights=token_mean), taught())[1]
    assert metrics["loss"] == pytest.approx(divergence[traj.mask].mean(), rel=1e-5)


def test_gkd_takes_the_estimator_given():
    traj = rollout(0)
    student, teacher = logits_of(traj)
    order = np.argsort(-student.reshape(-1, V), axis=1)
    parts = [coarse(x.reshape(-1, V), order, 2, True) for x in (teacher, student)]
    divergence = jsd(*parts, 0.3).reshape(traj.mask.shape)
    metrics = learn(gkd(compare, 0.3, partial(top_k, k=2)), taught())[1]
    assert metrics["divergence"] == pytest.approx(divergence[traj.mask].mean(), rel=1e-5)


def test_a_share_of_the_completions_is_the_students():
    sampled, dataset = rollout(0), rollout(1)
    for fraction, want in ((1.0, sampled), (0.0, dataset)):
        mixed = mix_completions(jax.random.key(0), sampled, dataset, fraction)
        jax.tree.map(np.testing.assert_array_equal, mixed, want)
    keys = jax.random.split(jax.random.key(1), 200)
    first = jax.vmap(lambda key: mix_completions(key, sampled, dataset, 0.25).logp[:, 0])(keys)
    own = np.asarray(first) == np.asarray(sampled.logp[:, 0])
    share = own.mean()
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / own.size)
    assert own.mean(axis=0).min() > 0.1  # of every row
    short = jax.tree.map(lambda x: x[:, :-1] if x.ndim > 1 else x, dataset)
    with pytest.raises(ValueError, match="pad the shorter one"):
        mix_completions(jax.random.key(0), sampled, short, 0.5)


def test_sdft_is_the_reverse_kl_to_what_the_teacher_says_having_read_more():
    traj = rollout(0)
    student, teacher = logits_of(traj, seen=(np.asarray(traj.inputs) + 1) % V)
    divergence = jsd(softmax(teacher), softmax(student), 1.0)
    mask = np.asarray(traj.mask) & (np.arange(16) != 5)[:, None]  # of row 5 the teacher saw nothing
    metrics = learn(sdft(compare), shown())[1]
    assert metrics["loss"] == pytest.approx(row_means(divergence, mask).mean(), rel=1e-5)


def test_sdpo_by_hand():
    traj = rollout(0)
    student, teacher = logits_of(traj, seen=(np.asarray(traj.inputs) + 1) % V)
    order = np.argsort(-student.reshape(-1, V), axis=1)
    parts = [coarse(x.reshape(-1, V), order, 3, True) for x in (teacher, student)]
    divergence = jsd(*parts, 0.3).reshape(traj.mask.shape)
    logp = np.take_along_axis(np.log(softmax(student)), np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    ratio = np.exp(logp - np.float64(traj.old_logp))
    mask = np.asarray(traj.mask) & (np.arange(16) != 5)[:, None]
    assert (ratio[mask] > 1.2).any()
    assert (ratio[mask] < 1.2).any()
    metrics = learn(sdpo(compare, 0.3, 1.2, partial(top_k, k=3)), shown())[1]
    assert metrics["loss"] == pytest.approx((np.minimum(ratio, 1.2) * divergence)[mask].mean(), rel=1e-5)


def test_the_importance_weight_is_a_constant():
    """With a cap below every ratio it is one: the gradient is that of the divergence alone."""
    capped = learn(sdpo(compare, 0.3, 1e-3, full_vocabulary), shown())[0]["table"]
    free = learn(sdpo(compare, 0.3, 1e9, full_vocabulary), on_policy(shown()))[0]["table"]
    plain = learn(gkd(compare, 0.3, full_vocabulary, token_mean), shown())[0]["table"]
    np.testing.assert_allclose(capped, 1e-3 * plain, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(free, plain, rtol=1e-4, atol=1e-6)


def on_policy(batch):
    """As if the student as it is had sampled the completions."""
    student, _ = logits_of(batch.traj)
    logp = np.take_along_axis(np.log(softmax(student)), np.asarray(batch.traj.actions)[..., None], axis=-1)[..., 0]
    logp = jnp.float32(logp)
    return batch.replace(traj=batch.traj.replace(logp=logp, old_logp=logp))


@pytest.mark.parametrize("make", [sdft, sdpo])
def test_self_distillation_without_a_view_of_the_teachers_own_is_refused(make):
    with pytest.raises(ValueError, match="teacher_view"):
        learn(make(compare), taught())


def test_rows_whose_views_differ_in_a_token_are_left_out():
    batch = shown()
    view = batch.teacher_view
    row = 8
    column = int(np.flatnonzero(np.asarray(view.mask[row]))[0])
    other = view.replace(actions=view.actions.at[row, column].add(1))
    fewer = view.replace(mask=view.mask.at[row, column].set(False))
    absent = view.replace(mask=view.mask.at[row].set(False))
    want = learn(sdft(compare), batch.replace(teacher_view=absent))[1]["loss"]
    for changed in (other, fewer):
        assert learn(sdft(compare), batch.replace(teacher_view=changed))[1]["loss"] == pytest.approx(want, rel=1e-6)
    assert learn(sdft(compare), batch)[1]["loss"] != pytest.approx(want, rel=1e-4)


def test_a_successful_peer_is_another_row_of_the_group():
    rewards = jnp.asarray([[1.0], [0.0], [1.0], [1.0], [0.0], [jnp.nan], [0.2]])
    one = jnp.ones((7, 1))
    traj = Trajectory(
        inputs=0 * one,
        actions=0 * one,
        logp=one,
        mask=one > 0,
        rewards=rewards,
        group=jnp.asarray([4, 4, 4, 1, 1, 9, 9]),
    )
    np.testing.assert_array_equal(successful_peers(traj), [2, 0, 0, -1, 3, -1, -1])
    np.testing.assert_array_equal(successful_peers(traj, 0.1), [2, 0, 0, -1, 3, 6, -1])


# ------------------------------------------------------------------------------------------------------------ MiniLLM


def test_minillm_by_hand():
    """The value of its loss: w_t (KL_t - R_{t+1} log q), R the mean of the later log ratios of the completion."""
    traj = rollout(0)
    student, teacher = logits_of(traj)
    chosen = np.asarray(traj.actions)[..., None]
    logq, logp = (np.take_along_axis(np.log(softmax(x)), chosen, axis=-1)[..., 0] for x in (student, teacher))
    divergence = jsd(softmax(teacher), softmax(student), 1.0)
    weight = np.exp(logq - np.float64(traj.logp))
    for normalized in (True, False):
        total = 0.0
        for b in np.flatnonzero(PRESENT):
            own = np.flatnonzero(traj.mask[b])
            for i, t in enumerate(own):
                later = (logp - logq)[b, own[i + 1 :]]
                later = (later.mean() if later.size else 0.0) if normalized else later.sum()
                total += weight[b, t] * (divergence[b, t] - later * logq[b, t])
        metrics = learn(minillm(compare, normalized), taught())[1]
        assert metrics["loss"] == pytest.approx(total / PRESENT.sum(), rel=1e-4)


LENGTH = 3
START = 0
COMPLETIONS = np.array(list(itertools.product(range(V), repeat=LENGTH)))


def all_completions(behavior):
    """Every completion of three tokens once, as if `behavior` (a table of logits) had sampled it; its log-prob."""
    inputs = np.concatenate([np.full((len(COMPLETIONS), 1), START), COMPLETIONS[:, :-1]], axis=1)
    logp = np.log(softmax(behavior))[inputs, COMPLETIONS]
    traj = Trajectory(
        inputs=jnp.asarray(inputs),
        actions=jnp.asarray(COMPLETIONS),
        logp=jnp.asarray(logp),
        mask=jnp.ones(inputs.shape, bool),
        temperature=jnp.ones(inputs.shape),
    )
    return Distillation(traj), logp.sum(axis=1)


def expected_gradient(objective, params, behavior):
    """Of the objective's loss on a completion that `behavior` samples: the sum over all of them."""
    batch, logp = all_completions(behavior)
    batch = objective.prepare(params, {}, batch, jax.random.key(0))
    weight = jnp.where(batch.traj.mask, jnp.exp(jnp.asarray(logp))[:, None], 0.0)
    return jax.grad(lambda p: objective.loss(p, {}, batch.replace(weight=weight))[0])(params)["table"]


def sequence_kl(table):
    """KL(q ‖ p) of whole completions, exactly."""
    inputs = all_completions(np.zeros((V, V)))[0].traj.inputs
    own, other = (
        jax.nn.log_softmax(x)[inputs, COMPLETIONS].sum(axis=1) for x in (table, jnp.asarray(np.float64(TEACHER)))
    )
    return (jnp.exp(own) * (own - other)).sum()


def test_minillm_is_unbiased_for_the_reverse_kl_of_whole_completions():
    with jax.enable_x64(True):
        params = {"table": jnp.asarray(np.float64(table_params()["table"]))}
        want = jax.grad(sequence_kl)(params["table"])
        behavior = np.asarray(params["table"])
        for estimator in (full_vocabulary, sampled_token):
            objective = minillm(compare, length_normalized=False, estimator=estimator, weights=token_sum)
            np.testing.assert_allclose(expected_gradient(objective, params, behavior), want, rtol=1e-9, atol=1e-12)
        normalized = minillm(compare, weights=token_sum)
        assert np.abs(expected_gradient(normalized, params, behavior) - want).max() > 1e-3


def test_divergences_at_the_visited_states_leave_out_what_a_token_changes_for_later_ones():
    """On-policy GKD with β = 1 is MiniLLM without its second term."""
    with jax.enable_x64(True):
        params = {"table": jnp.asarray(np.float64(table_params()["table"]))}
        behavior = np.asarray(params["table"])
        found = expected_gradient(gkd(compare, 1.0, weights=seq_mean_token_sum), params, behavior)
        last_only = jax.grad(sequence_kl)(params["table"])
        assert np.abs(found - last_only).max() > 1e-3
        by_token = expected_gradient(gkd(compare, 1.0, sampled_token, seq_mean_token_sum), params, behavior)
        np.testing.assert_allclose(by_token, found, rtol=1e-9, atol=1e-12)
