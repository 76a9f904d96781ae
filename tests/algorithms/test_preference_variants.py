"""DPOP, ODPO, Step-DPO, XPO, TPO and Nash-MD by hand: the papers' equations in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms.dpo import dpo
from rljax.algorithms.dpop import dpop
from rljax.algorithms.nash_md import nash_md
from rljax.algorithms.odpo import odpo
from rljax.algorithms.step_dpo import first_differing_step, step_dpo
from rljax.algorithms.tpo import tpo, tpo_l
from rljax.algorithms.xpo import xpo, xpo_pairs
from rljax.train.objective import policy_objective
from rljax.types import Batch, Pairs, Trajectory
from tests.algorithms.test_preferences import (
    explored,
    learn,
    log_ratios,
    on_trajectories,
    pairs,
    policy,
    rated,
    triples,
)
from tests.algorithms.tiny import V, agree, credited, rollout, table_params, table_policy
from tests.algorithms.tiny import learn as learn_algorithm
from tests.dialects import trl_nash_md_of_single_tokens

PRESENT = np.arange(16) != 3


def log_sigma(x):
    return -np.logaddexp(0.0, -x)


def sides(batch):
    """Δ and log π of the chosen completions, then of the rejected ones."""
    return *log_ratios(batch.chosen), *log_ratios(batch.rejected)


def loss_of(objective, batch):
    return learn(objective, batch)[1]["loss"]


# -------------------------------------------------------------------------------------------------------------- DPOP


def test_dpop_takes_from_the_margin_what_the_chosen_one_fell_below_the_reference():
    """arXiv:2402.13228, eq. 3."""
    lower = pairs().chosen.replace(ref_logp=pairs().chosen.ref_logp - 0.7)
    batch = pairs().replace(chosen=lower)
    chosen, _, rejected, _ = sides(batch)
    fall = np.maximum(0.0, -chosen)
    assert 0 < (fall[PRESENT] > 0).sum() < PRESENT.sum()
    want = -log_sigma(0.3 * (chosen - rejected - 2.0 * fall))[PRESENT].mean()
    assert loss_of(dpop(policy, 0.3, 2.0), batch) == pytest.approx(want, rel=1e-5)


def test_dpop_without_the_penalty_is_dpo():
    agree(learn(dpop(policy, 0.5, 0.0), pairs())[0], learn(dpo(policy, beta=0.5), pairs())[0])


# -------------------------------------------------------------------------------------------------------------- ODPO


def test_odpo_asks_for_more_where_the_scores_are_further_apart():
    """arXiv:2402.10571: the offset is α log of the difference of the scores."""
    chosen, _, rejected, _ = sides(pairs())
    above = PRESENT & (np.arange(16) > 0)  # the margin of row 0 is 0
    offset = 0.7 * np.log(np.float64(rated().margin)[above])
    terms = -log_sigma(0.5 * (chosen - rejected)[above] - offset)
    want = terms.sum() / PRESENT.sum()
    assert loss_of(odpo(policy, 0.5, 0.7), rated()) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, -1.0, np.nan])
def test_a_pair_without_a_difference_of_scores_teaches_nothing(margin):
    batch = pairs().replace(margin=jnp.full(16, margin))
    gradient, metrics = learn(odpo(policy), batch)
    assert metrics["loss"] == 0
    assert not gradient["table"].any()


def test_a_margin_of_one_is_dpo():
    batch = rated().replace(margin=jnp.ones(16))
    agree(learn(odpo(policy, 0.5), batch)[0], learn(dpo(policy, beta=0.5), pairs())[0])
    with pytest.raises(ValueError, match=r"does not use Pairs\.margin"):
        learn(dpo(policy), batch)


def test_odpo_without_margins_says_so():
    with pytest.raises(ValueError, match=r"Pairs\.margin"):
        learn(odpo(policy), pairs().replace(margin=None))


# ---------------------------------------------------------------------------------------------------------- Step-DPO


def solution(tokens, mask, ends):
    """One row: its tokens, which are the policy's own, and which end a step. The state is the token before."""
    tokens, mask, ends = (np.asarray(x)[None] for x in (tokens, mask, ends))
    inputs = np.concatenate([np.zeros((1, 1), int), tokens[:, :-1]], axis=1)
    one = jnp.ones(tokens.shape)
    return Trajectory(
        inputs=jnp.asarray(inputs),
        actions=jnp.asarray(tokens),
        logp=one,
        ref_logp=-one,
        temperature=one,
        mask=jnp.asarray(mask > 0),
        step_ends=jnp.asarray(ends > 0),
    )


def test_step_dpo_compares_the_first_step_that_differs():
    """Steps 12|30|41 against 12|312|0, with a foreign token inside each; step ends there are no steps."""
    chosen = solution([1, 4, 2, 3, 0, 4, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1, 1])
    rejected = solution([0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0, 1, 1, 0])
    found = first_differing_step(Pairs(chosen, rejected))
    np.testing.assert_array_equal(found.chosen.mask[0], np.isin(np.arange(8), [3, 4]))
    np.testing.assert_array_equal(found.rejected.mask[0], np.isin(np.arange(9), [3, 5, 6]))
    (delta_w, _), (delta_l, _) = log_ratios(found.chosen), log_ratios(found.rejected)
    want = -log_sigma(0.5 * (delta_w - delta_l)).mean()
    assert loss_of(step_dpo(policy), Pairs(chosen, rejected)) == pytest.approx(want, rel=1e-5)
    assert loss_of(dpo(policy, beta=0.5), Pairs(chosen, rejected)) != pytest.approx(want, rel=1e-3)


def test_of_two_equal_solutions_nothing_is_compared():
    one = solution([1, 2, 3, 0], [1, 1, 1, 1], [0, 1, 0, 1])
    found = first_differing_step(Pairs(one, one))
    assert not found.chosen.mask.any()
    assert not found.rejected.mask.any()


def test_a_solution_that_stops_has_no_step_against_the_other_ones_next():
    short = solution([1, 2, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0])
    long = solution([1, 2, 3, 0], [1, 1, 1, 1], [0, 1, 0, 1])
    found = first_differing_step(Pairs(short, long))
    assert not found.chosen.mask.any()
    np.testing.assert_array_equal(found.rejected.mask[0], [False, False, True, True])


def test_step_dpo_without_steps_says_so():
    with pytest.raises(ValueError, match="step_ends"):
        learn(step_dpo(policy), on_trajectories(lambda traj: traj.replace(step_ends=None), pairs()))


# --------------------------------------------------------------------------------------------------------------- XPO


def test_xpo_pushes_the_references_completion_down():
    """arXiv:2405.21046, algorithm 1: α Σ log π(ỹ) - Σ log σ(β Δ), both over the pairs that could be judged."""
    own, other = rollout(0), rollout(1)
    rewards, other_rewards = (np.nansum(np.where(x.mask, x.rewards, 0.0), axis=1) for x in (own, other))
    judged = PRESENT & (np.arange(16) != 7)
    own_wins = rewards >= other_rewards
    assert 3 < own_wins[judged].sum() < 12
    (delta, _), (other_delta, other_logp) = log_ratios(own), log_ratios(other)
    margin = np.where(own_wins, delta - other_delta, other_delta - delta)
    want = (0.1 * other_logp - log_sigma(0.5 * margin))[judged].mean()
    assert loss_of(xpo(policy, beta=0.5, alpha=0.1), explored()) == pytest.approx(want, rel=1e-5)


def test_xpo_without_a_bonus_is_dpo():
    agree(learn(xpo(policy, beta=0.5, alpha=0.0), explored())[0], learn(dpo(policy, beta=0.5), explored())[0])


def test_of_equal_rewards_the_policys_own_is_chosen():
    traj = rollout(0)
    found = xpo_pairs(traj, traj.replace(inputs=traj.inputs + V))
    assert not found.extra["chosen_by_reference"].any()
    np.testing.assert_array_equal(found.chosen.inputs, traj.inputs)
    np.testing.assert_array_equal(found.rejected.inputs, traj.inputs + V)
    np.testing.assert_array_equal(found.chosen.mask.any(axis=1), ~np.isin(np.arange(16), [3, 7]))


def test_trajectories_of_two_widths_make_no_pairs():
    short = jax.tree.map(lambda x: x[:, :-1] if x.ndim > 1 else x, rollout(1))
    with pytest.raises(ValueError, match="pad the shorter one"):
        xpo_pairs(rollout(0), short)


def test_xpo_asks_who_wrote_what():
    with pytest.raises(ValueError, match="xpo_pairs"):
        learn(xpo(policy), pairs())


# --------------------------------------------------------------------------------------------------------------- TPO


def lengths(traj):
    return np.maximum(np.asarray(traj.mask).sum(axis=1), 1)


def test_tpo_by_hand():
    """arXiv:2405.16681: sums, or for TPO-L token means and a margin; the NLL is the gold ones' token mean."""
    batch = triples()
    _, chosen, _, rejected = sides(batch)
    gold = log_ratios(batch.gold)[1]
    nll = -gold.sum() / np.asarray(batch.gold.mask).sum()
    want = -log_sigma(0.5 * (chosen - rejected))[PRESENT].mean() + 0.3 * nll
    metrics = learn(tpo(policy, 0.5, 0.3), batch)[1]
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)
    assert metrics["nll/gold"] == pytest.approx(nll, rel=1e-5)
    means = chosen / lengths(batch.chosen) - rejected / lengths(batch.rejected)
    want = -log_sigma(2.0 * means - 1.6)[PRESENT].mean() + 0.05 * nll
    assert loss_of(tpo_l(policy), batch) == pytest.approx(want, rel=1e-5)


def test_tpo_without_a_gold_completion_says_so():
    with pytest.raises(ValueError, match=r"Pairs\.gold"):
        learn(tpo(policy), pairs())


# ----------------------------------------------------------------------------------------------------------- Nash-MD


def test_nash_md_by_hand():
    """arXiv:2312.00886, Nash-MD-PG: the payoff of a completion times its log-prob, averaged over the completions."""
    traj = rollout(0)
    rewards = np.where(traj.mask, np.float64(traj.rewards), 0.0).sum(axis=1)
    delta, logp = log_ratios(traj)
    judged = PRESENT & (np.arange(16) != 7)
    want = -((rewards - 0.5 - 0.2 * delta) * logp)[judged].mean()
    metrics = learn_algorithm(nash_md(0.2), credited(nash_md(0.2), traj), table_params())[1]
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)


LENGTH = 3
COMPLETIONS = np.array(list(itertools.product(range(V), repeat=LENGTH)))
INPUTS = np.concatenate([np.zeros((len(COMPLETIONS), 1), int), COMPLETIONS[:, :-1]], axis=1)
draw = np.random.default_rng(5)
REFERENCE = draw.normal(size=(V, V))
PREFERRED = draw.uniform(size=len(COMPLETIONS))  # P(y ≻ y') of each completion, the opponent averaged out


def completion_logp(table):
    return jax.nn.log_softmax(jnp.asarray(table))[INPUTS, COMPLETIONS].sum(axis=1)


def expected_gradient(algorithm):
    """Of the loss on a completion that the policy samples: the sum over all of them."""
    shape = INPUTS.shape
    rewards = np.zeros(shape)
    rewards[:, -1] = PREFERRED
    ref_logp = jax.nn.log_softmax(jnp.asarray(REFERENCE))[INPUTS, COMPLETIONS]
    params = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), table_params())
    traj = Trajectory(
        inputs=jnp.asarray(INPUTS),
        actions=jnp.asarray(COMPLETIONS),
        logp=jnp.zeros(shape),
        ref_logp=ref_logp,
        rewards=jnp.asarray(rewards),
        temperature=jnp.ones(shape),
        mask=jnp.ones(shape, bool),
    )
    batch: Batch = algorithm.credit(traj, {})
    probability = jnp.exp(completion_logp(params["table"]))[:, None]
    batch = batch.replace(weight=jnp.broadcast_to(probability, shape))
    objective = policy_objective(table_policy, algorithm)
    return jax.grad(lambda p: objective.loss(p, {}, batch)[0])(params)["table"]


def test_nash_md_has_the_gradient_of_the_preference_less_the_kl_of_completions():
    def negative_payoff(table):
        own = completion_logp(table)
        return -(jnp.exp(own) * (jnp.asarray(PREFERRED) - 0.3 * (own - completion_logp(REFERENCE)))).sum()

    with jax.enable_x64(True):
        want = jax.grad(negative_payoff)(jnp.asarray(np.float64(table_params()["table"])))
        np.testing.assert_allclose(expected_gradient(nash_md(0.3)), want, rtol=1e-9, atol=1e-12)


def test_trls_kl_of_single_tokens_is_another_gradient():
    """TRL weighs each token with its own log ratio, not with that of the completion: what a token changes for the KL of
    later ones is lost (NashMDTrainer._compute_losses)."""
    with jax.enable_x64(True):
        dialect = expected_gradient(trl_nash_md_of_single_tokens(0.3))
        assert np.abs(dialect - expected_gradient(nash_md(0.3))).max() > 1e-3
