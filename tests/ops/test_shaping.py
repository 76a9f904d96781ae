"""Where rewards stand and what is added to them, by hand and by enumeration."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import kl, sequences, shaping
from rljax.ops.returns import discounted_returns, total_return

nan = np.nan
MASK = jnp.array([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_an_outcome_stands_on_the_last_decision_whatever_the_padding():
    got = shaping.at_last_decision(f32([1.0, nan, 3.0, 4.0]), MASK)
    np.testing.assert_array_equal(got, [[0, 0, 0, 1, 0], [0, 0, 0, 0, nan], [0] * 5, [4, 0, 0, 0, 0]])


def test_a_steps_reward_is_spread_over_its_decisions_alone():
    ends = jnp.array([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    rewards = f32([[0, 6, 99, 1, nan], [nan, nan, 2, 0, 8], [5] * 5, [7, nan, 0, 0, 0]])
    got = shaping.spread_over_steps(rewards, ends, MASK)
    np.testing.assert_array_equal(got, [[3, 3, 0, 1, 0], [0, 0, 2, 4, 4], [0] * 5, [7, 0, 0, 0, 0]])
    np.testing.assert_array_equal(shaping.step_numbers(ends, MASK)[0], [0, 0, 1, 1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_spreading_keeps_the_reward_of_every_row_and_reward_to_go_of_every_step(seed):
    draw = np.random.default_rng(seed)
    mask, ends = draw.random((2, 5, 9)) < 0.6
    ends &= mask
    rewards = np.where(ends, draw.normal(size=(5, 9)), 0.0)
    spread = shaping.spread_over_steps(f32(rewards), jnp.asarray(ends), jnp.asarray(mask))
    to_go = discounted_returns(spread, jnp.asarray(mask))
    for b in range(5):
        own = np.flatnonzero(mask[b])
        for i, t in enumerate(own):
            if i == 0 or ends[b, own[i - 1]]:  # the first decision of a step
                np.testing.assert_allclose(to_go[b, t], rewards[b, t:].sum(), atol=1e-5)


def test_soft_overlong_is_0_then_a_slope_then_minus_1():
    lengths = jnp.array([0, 80, 81, 90, 100, 101, 500])
    np.testing.assert_allclose(shaping.soft_overlong_punishment(lengths, 100, 20), [0, 0, -0.05, -0.5, -1, -1, -1])
    np.testing.assert_array_equal(shaping.soft_overlong_punishment(lengths, 100, 0), [0, 0, 0, 0, 0, -1, -1])


def test_truncated_answers_are_scaled_and_shifted():
    rewards, cut = f32([1.0, 1.0, -1.0, nan]), jnp.array([False, True, True, True])
    np.testing.assert_allclose(shaping.truncation_penalty(rewards, cut, scale=0.25), [1.0, 0.25, -0.25, nan])
    np.testing.assert_allclose(shaping.truncation_penalty(rewards, cut, offset=-0.5), [1.0, 0.5, -1.5, nan])


def test_rewards_are_clipped():
    np.testing.assert_array_equal(shaping.clip_rewards(f32([-3, 0.5, 7, nan])), [-1, 0.5, 1, nan])


def test_the_return_of_penalised_rewards_is_reward_less_beta_kl_of_whole_answers():
    """Two decisions out of three tokens, the second policy depending on the first token: all nine answers."""
    draw = np.random.default_rng(0)
    pi, ref = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True) for z in draw.normal(size=(2, 4, 3)))
    answers = np.array(list(product(range(3), repeat=2)))
    pick = lambda p: np.stack([p[3, answers[:, 0]], p[answers[:, 0], answers[:, 1]]], axis=1)  # noqa: E731
    logp, ref_logp = np.log(pick(pi)), np.log(pick(ref))
    probability, outcome = pick(pi).prod(axis=1), draw.normal(size=9)
    want = (probability * (outcome - 0.3 * (np.log(probability) - ref_logp.sum(axis=1)))).sum()
    everywhere = jnp.ones((9, 2), bool)
    rewards = shaping.at_last_decision(f32(outcome), everywhere)
    penalised = shaping.apply_kl_penalty(rewards, f32(logp), f32(ref_logp), everywhere, 0.3)
    np.testing.assert_allclose((probability * total_return(penalised, everywhere)).sum(), want, rtol=1e-5)


def test_the_kl_penalty_is_a_fact_and_keeps_what_was_not_judged():
    draw = np.random.default_rng(1)
    rewards = shaping.at_last_decision(f32([1.0, nan, 3.0, 4.0]), MASK)
    logp, ref_logp = (f32(np.where(MASK, x, nan)) for x in draw.normal(size=(2, 4, 5)))
    got = shaping.apply_kl_penalty(rewards, logp, ref_logp, MASK, jnp.float32(0.1), kl.k3)
    d = np.asarray(logp - ref_logp)
    want = np.where(MASK, np.asarray(rewards) - 0.1 * (np.exp(-d) - 1 + d), 0.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.isnan(got[1, 4])
    slope = jax.grad(lambda x: jnp.nansum(shaping.apply_kl_penalty(rewards, x, ref_logp, MASK, 0.1)))(logp)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_by_a_potential_adds_the_same_to_every_episode_from_one_state(gamma):
    """Σ γ^t F_t = γ^n Φ(end) - Φ(start): -Φ(start) where the episode terminated, however it went."""
    draw = np.random.default_rng(2)
    potentials = f32(np.where(np.pad(MASK, ((0, 0), (0, 1)), constant_values=True), draw.normal(size=(4, 6)), nan))
    ended = sequences.last_decision(MASK)
    added = shaping.potential_shaping(potentials, MASK, gamma, ended)
    start = np.array([potentials[0, 0], potentials[1, 2], 0.0, potentials[3, 0]])
    np.testing.assert_allclose(total_return(added, MASK, gamma), -start, rtol=1e-5)
    going_on = shaping.potential_shaping(potentials, MASK, gamma)
    reached = np.array([gamma**3, gamma**3, 0.0, gamma]) * np.asarray(potentials[:, -1])
    np.testing.assert_allclose(total_return(going_on, MASK, gamma), reached - start, rtol=1e-4, atol=1e-6)


def test_shaping_where_an_episode_is_cut_inside_a_row_sees_its_last_observation():
    """Columns 0 and 1 are an episode that was cut, whose last state has potential 5; the next begins at potential 7."""
    potentials, everywhere = f32([[1.0, 2.0, 7.0, 4.0]]), jnp.ones((1, 3), bool)
    cut = jnp.array([[False, True, False]])
    added = shaping.potential_shaping(potentials, everywhere, 0.9, None, cut, f32([[nan, 5.0, nan]]))
    np.testing.assert_allclose(added, [[0.9 * 2 - 1, 0.9 * 5 - 2, 0.9 * 4 - 7]], rtol=1e-6)
    with pytest.raises(ValueError, match="give final_values"):
        shaping.potential_shaping(potentials, everywhere, 0.9, None, cut)
