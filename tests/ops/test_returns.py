"""Returns and GAE against sums written out in numpy, and against rlax, verl and tunix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import returns, statistics
from tests.ops.golden import close, golden, narrow

discounted_returns, gae, whiten = (jax.jit(f) for f in (returns.discounted_returns, returns.gae, statistics.whiten))
B, T = 6, 9


def episodes(seed):
    """Random rewards, values, a mask with holes and an empty row, and ends of both kinds."""
    draw = np.random.default_rng(seed)
    rewards, values = draw.normal(size=(B, T)), draw.normal(size=(B, T + 1))
    mask = draw.random((B, T)) < 0.7
    mask[2] = False
    terminated = draw.random((B, T)) < 0.2
    truncated = (draw.random((B, T)) < 0.2) & ~terminated
    return rewards, values, mask, terminated, truncated, draw.normal(size=(B, T))


def advantage_by_sums(rewards, values, mask, terminated, truncated, final_values, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k} over the row's own decisions, up to the end of its episode. float64."""
    out = np.zeros((B, T))
    for b in range(B):
        own = np.flatnonzero(mask[b])
        for i, t in enumerate(own):
            for k, s in enumerate(own[i:]):
                following = values[b, own[i + k + 1]] if i + k + 1 < len(own) else values[b, T]
                bootstrap = 0.0 if terminated[b, s] else final_values[b, s] if truncated[b, s] else following
                out[b, t] += (gamma * lam) ** k * (rewards[b, s] + gamma * bootstrap - values[b, s])
                if terminated[b, s] or truncated[b, s]:
                    break
    return out


def run_gae(rewards, values, mask, terminated, truncated, final_values, gamma, lam):
    rewards, values, final_values = (narrow(x) for x in (rewards, values, final_values))
    mask, terminated, truncated = (jnp.asarray(x) for x in (mask, terminated, truncated))
    return gae(rewards, values, mask, gamma, lam, terminated, truncated, final_values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.97, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_is_the_discounted_sum_of_td_errors_over_the_rows_own_decisions(seed, gamma, lam):
    facts = episodes(seed)
    close(run_gae(*facts, gamma, lam), advantage_by_sums(*facts, gamma, lam), atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_return_is_the_sum_of_what_the_row_still_earns(gamma):
    rewards, _, mask, *_ = episodes(0)
    want = np.zeros((B, T))
    for b in range(B):
        own = np.flatnonzero(mask[b])
        for i, t in enumerate(own):
            want[b, t] = sum(gamma**k * rewards[b, s] for k, s in enumerate(own[i:]))
    close(discounted_returns(narrow(rewards), jnp.asarray(mask), gamma), want)


def test_at_lambda_one_the_advantage_is_the_return_less_the_value():
    rewards, values, mask, *_ = episodes(1)
    values[:, -1] = 0.0
    never = np.zeros((B, T), bool)
    got = run_gae(rewards, values, mask, never, never, np.zeros((B, T)), 0.9, 1.0)
    earned = discounted_returns(narrow(rewards), jnp.asarray(mask), 0.9)
    close(got + values[:, :-1], earned, where=mask, atol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_what_stands_at_masked_columns_never_matters(garbage):
    rewards, values, mask, terminated, truncated, final_values = episodes(2)
    clean = run_gae(rewards, values, mask, terminated, truncated, final_values, 0.9, 0.8)
    spoil = lambda x: np.where(mask, x, garbage)  # noqa: E731
    values = np.concatenate([spoil(values[:, :-1]), values[:, -1:]], axis=1)
    dirty = run_gae(spoil(rewards), values, mask, terminated | ~mask, truncated | ~mask, spoil(final_values), 0.9, 0.8)
    np.testing.assert_array_equal(clean, dirty)
    earned = discounted_returns(narrow(spoil(rewards)), jnp.asarray(mask), 0.9)
    np.testing.assert_array_equal(earned, discounted_returns(narrow(rewards), jnp.asarray(mask), 0.9))


def test_leading_axes_are_free():
    rewards, values, mask, *_ = (np.asarray(x) for x in episodes(0))
    flat = narrow(rewards), narrow(values), jnp.asarray(mask)
    stacked = gae(*(x.reshape(2, 3, -1) for x in flat))
    close(stacked.reshape(B, T), gae(*flat))


def test_rlax_gae_with_an_episode_that_ends_inside(shared):
    for case, (hyper, ins, outs) in golden(shared, "rlax_gae").items():
        discount = ins["discount_t"]
        ended = discount == 0
        assert ended.any()
        always = jnp.ones_like(ended)
        got = gae(ins["r_t"], ins["values"], always, discount.max(), hyper["lambda_"], terminated=ended)
        close(got, outs["advantages"], case=case, atol=1e-5)


def test_rlax_discounted_returns(shared):
    """rlax bootstraps from the last value and takes a discount a step: 0 cuts an episode in two."""
    for case, (_, ins, outs) in golden(shared, "rlax_discounted_returns").items():
        discount, gamma = np.asarray(ins["discount_t"]), float(ins["discount_t"].max())
        cut = int(np.flatnonzero(discount == 0)[0]) + 1
        rewards = ins["r_t"].at[-1].add(gamma * ins["v_t"][-1])
        parts = [discounted_returns(part, part == part, gamma) for part in (rewards[:cut], rewards[cut:])]
        close(np.concatenate(parts), outs["returns"], case=case)


def test_verl_gae_in_every_kind_of_mask(shared):
    """verl whitens inside; its returns are of the advantages before that."""
    for case, (hyper, ins, outs) in golden(shared, "verl_gae").items():
        mask = ins["response_mask"] > 0
        values = jnp.pad(ins["values"], ((0, 0), (0, 1)))
        got = gae(ins["token_level_rewards"], values, mask, hyper["gamma"], hyper["lam"])
        close(got + ins["values"], outs["returns"], where=mask, case=case)
        close(whiten(got, mask), outs["advantages"], where=mask, case=case, atol=1e-5)


def test_tunix_gae_with_and_without_holes(shared):
    for case, (hyper, ins, outs) in golden(shared, "tunix_gae").items():
        mask = ins["completion_mask"] > 0
        values = jnp.pad(ins["values"], ((0, 0), (0, 1)))
        got = gae(ins["rewards"], values, mask, hyper["gamma"], hyper["gae_lambda"])
        close(got + ins["values"], outs["returns"], where=mask, case=case)
        close(whiten(got, mask), outs["advantages"], where=mask, case=case, atol=1e-5)
