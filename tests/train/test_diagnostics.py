"""Diagnostics by enumeration and by hand. Those of verl are in tests/golden/estimation.py too."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.train import diagnostics
from rljax.train.metrics import policy_metrics
from rljax.types import Batch, PolicyOutput, Trajectory

nan = np.nan


def f32(x):
    return jnp.asarray(x, jnp.float32)


# Two prompts of three completions, and one of a completion that was not scored, rows in any order.
GROUP = jnp.array([7, 2, 7, 2, 9, 7, 2])
ANSWER = jnp.array([10, 10, 11, 12, 10, 10, 13])
CORRECT = jnp.array([True, False, False, True, True, True, False])
VALID = jnp.array([True, True, True, True, False, True, True])


def test_rates_of_solving_are_means_over_prompts():
    got = jax.jit(diagnostics.solve_rates, static_argnums=3)(CORRECT, GROUP, VALID, (1, 2, 3), ANSWER)
    want = {
        "avg@1": (1 + 0) / 2,
        "avg@2": (1 / 2 + 1 / 2) / 2,
        "avg@3": (2 / 3 + 1 / 3) / 2,
        "pass@1": (2 / 3 + 1 / 3) / 2,
        "pass@2": (1 + 2 / 3) / 2,
        "pass@3": 1,
        "maj@1": (1 + 0) / 2,
        "maj@2": (1 / 2 + 1 / 2) / 2,  # both prompts tie
        "maj@3": (1 + 1 / 3) / 2,  # 10 twice; a tie of three
    }
    assert {name: float(x) for name, x in got.items()} == pytest.approx(want, rel=1e-6)


def test_rates_depend_neither_on_the_names_of_groups_nor_on_rows_that_were_not_scored():
    facts = CORRECT, GROUP, VALID, ANSWER
    whole = diagnostics.solve_rates(*facts[:3], (3,), ANSWER)
    for order in list(permutations(range(7)))[::701]:
        correct, group, valid, answer = (x[jnp.array(order)] for x in facts)
        mixed = diagnostics.solve_rates(correct, 100 - group, valid, (3,), 5 * answer)
        less = diagnostics.solve_rates(*(x[valid] for x in (correct, group, valid)), (3,), answer[valid])
        for other in (mixed, less):
            assert {k: float(v) for k, v in other.items()} == pytest.approx({k: float(v) for k, v in whole.items()})


def test_a_prompt_with_fewer_scored_completions_than_k_has_no_pass_rate_solved_or_not():
    group = jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    valid = jnp.array([True, True, False] * 2 + [True] * 3)
    correct = jnp.array([True, True, False, False, False, False, True, False, False])
    got = diagnostics.solve_rates(correct, group, valid, (2, 3))
    assert float(got["pass@3"]) == 1
    assert float(got["pass@2"]) == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_rates_of_nothing_are_no_numbers():
    got = diagnostics.solve_rates(CORRECT, GROUP, VALID & False, (1,), ANSWER)
    assert got.keys() == {"avg@1", "pass@1", "maj@1"}
    assert all(np.isnan(x) for x in got.values())


def test_sampler_mismatch_estimates_the_divergences_it_is_named_after():
    """One decision a row, rows in the proportions of the sampler's distribution."""
    sampler = np.array([0.5, 0.25, 0.125, 0.125])
    trainer = np.array([0.4, 0.3, 0.2, 0.1])
    tokens = np.repeat(np.arange(4), (sampler * 8).astype(int))
    logp, sampler_logp = (
        np.pad(np.log(p)[tokens][:, None], ((0, 1), (1, 1)), constant_values=nan) for p in (trainer, sampler)
    )
    mask = np.pad(np.ones((8, 1), bool), ((0, 1), (1, 1)))  # and a row without a decision
    got = diagnostics.sampler_mismatch(f32(logp), f32(sampler_logp), jnp.asarray(mask))
    divergence = (sampler * np.log(sampler / trainer)).sum()
    chi2 = (trainer**2 / sampler).sum() - 1
    want = {
        "kl": divergence,
        "kl_k3": divergence,
        "chi2": chi2,
        "chi2_sequence": chi2,
        "log_perplexity_gap": divergence,
    }
    want |= {"perplexity": 4.0, "perplexity_ratio": (sampler**2 / trainer).sum()}
    want |= {"log_perplexity_gap_max": np.log(1.25), "log_perplexity_gap_min": np.log(0.125 / 0.2)}
    assert {name: float(got[name]) for name in want} == pytest.approx(want, rel=1e-4)


def test_the_weight_of_an_answer_is_the_product_of_its_decisions():
    draw = np.random.default_rng(0)
    logp, sampler_logp = draw.normal(size=(2, 5, 4))
    mask = draw.random((5, 4)) < 0.7
    mask[1] = False
    got = diagnostics.sampler_mismatch(f32(logp), f32(sampler_logp), jnp.asarray(mask))
    weight = [np.exp((logp - sampler_logp)[row][mask[row]].sum()) for row in range(5) if row != 1]
    np.testing.assert_allclose(got["chi2_sequence"], np.mean(np.square(weight)) - 1, rtol=1e-4)


def test_the_policys_diagnostics_are_those_of_its_ratios():
    draw = np.random.default_rng(1)
    logp, behavior, old = (f32(x) for x in draw.normal(size=(3, 4, 6)))
    zeros = jnp.zeros((4, 6))
    traj = Trajectory(zeros, zeros, behavior, zeros == 0)
    batch = Batch(traj=traj, advantages=zeros, mask=traj.mask)
    got = policy_metrics(PolicyOutput(logp=logp), batch)
    d = np.float64(logp) - np.float64(behavior)
    np.testing.assert_allclose(got["ratio_min"], np.exp(d), rtol=1e-5)
    np.testing.assert_allclose(got["ratio_squared"], np.exp(2 * d), rtol=1e-5)
    np.testing.assert_allclose(got["kl_behavior"], np.exp(d) - 1 - d, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["kl_behavior_k1"], -d, rtol=1e-5)
    assert "kl_old" not in got
    assert "entropy" not in got
    got = policy_metrics(PolicyOutput(logp=logp, entropy=zeros), batch.replace(traj=traj.replace(old_logp=old)))
    d = np.float64(logp) - np.float64(old)
    np.testing.assert_allclose(got["kl_old"], np.exp(d) - 1 - d, rtol=1e-4, atol=1e-6)
    assert "entropy" in got
