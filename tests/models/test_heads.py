"""Heads against the hidden states of whole rows, computed token by token without a trajectory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import decoder, heads, policy
from rljax.train.shared_prefix import share_prefix
from rljax.types import Batch, trajectory_of_tokens

CONFIG = decoder.DecoderConfig(13, 8, 2, 2, 1, 4, 12)
S = 9
TOKENS = np.random.default_rng(0).integers(0, 13, (4, S))
# An answer to the end; padding on the left; padding on the right; two packed texts.
SEGMENTS = np.array([[1] * 9, [0] * 3 + [1] * 6, [1] * 6 + [0] * 3, [1] * 4 + [2] * 5])
CHOSEN = (SEGMENTS > 0) & (np.arange(S) >= np.array([[4], [5], [3], [6]]))


@pytest.fixture(scope="module")
def params():
    return heads.with_score_head(policy.init(CONFIG, jax.random.key(0)), CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def after(params):
    """[4 S]: what the head says when the text up to and with each token has been read, text by text."""
    forward = jax.jit(partial(decoder.forward, CONFIG))
    out = np.full((4, S), np.nan)
    for b in range(4):
        for segment in (1, 2):
            (places,) = np.nonzero(SEGMENTS[b] == segment)
            if len(places):
                text = jnp.asarray(TOKENS[b, places])[None]
                at = jnp.arange(len(places))[None]
                hidden, _ = forward(params["decoder"], text, at, jnp.ones_like(at))
                out[b, places] = hidden[0] @ params["score_head"]
    return out


def traj_of(rows):
    return trajectory_of_tokens(TOKENS[rows], SEGMENTS[rows], jnp.asarray(CHOSEN[rows]), np.zeros((len(rows), S)))


def test_a_step_is_judged_after_its_token(params, after):
    traj = traj_of([0, 1, 2, 3])
    got = jax.jit(heads.make_process_reward_model(CONFIG))(params, {}, traj)
    np.testing.assert_allclose(np.where(traj.mask, got, 0), np.where(traj.mask, after[:, 1:], 0), rtol=1e-5, atol=1e-5)


def test_an_answer_is_scored_at_the_last_token_that_the_mask_calls_its_own(params, after):
    got = jax.jit(heads.make_reward_model(CONFIG))(params, {}, traj_of([0, 1, 2]))
    np.testing.assert_allclose(got, [after[0, 8], after[1, 8], after[2, 5]], rtol=1e-5, atol=1e-5)


def test_rows_that_hold_a_prompt_once_are_refused(params):
    traj = traj_of([0])
    with pytest.raises(ValueError, match="would be scored without it; legal: each completion behind its prompt"):
        heads.make_reward_model(CONFIG)(params, {}, traj.replace(context=jnp.zeros_like(traj.segments)))


def test_rows_are_put_together_as_they_were():
    traj = traj_of([0, 1, 2, 3])
    tokens, positions, segments = heads.full_sequences(traj)
    np.testing.assert_array_equal(segments, SEGMENTS)
    real = SEGMENTS > 0
    np.testing.assert_array_equal(np.where(real, tokens, 0), np.where(real, TOKENS, 0))
    want = [np.arange(9), [0] * 3 + list(range(6)), list(range(6)) + [0] * 3, [0, 1, 2, 3, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(np.where(real, positions, 0), want)


def test_a_critic_of_its_own_trunk_moves_without_the_policy(params):
    """At first it is the policy's trunk; a gradient of the values reaches the critic alone."""
    both = policy.with_critic({"decoder": params["decoder"]}, CONFIG)
    both["critic"]["value_head"] = params["score_head"]
    shared = {"decoder": params["decoder"], "value_head": params["score_head"]}
    traj, model = traj_of([0, 1]), jax.jit(policy.make_policy(CONFIG))
    np.testing.assert_allclose(model(both, {}, traj).values, model(shared, {}, traj).values, rtol=1e-6)
    slopes = jax.jit(jax.grad(lambda p: (model(p, {}, traj).values ** 2).sum()))(both)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slopes["decoder"]))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(slopes["critic"]["decoder"]["layers"]))
    axes = policy.logical_axes(CONFIG, both)
    jax.tree.map(lambda x, names: len(names) == x.ndim or pytest.fail(f"{x.shape}: {names}"), both, axes)


def test_scores_after_a_shared_prefix_are_those_of_whole_rows(params):
    tokens = TOKENS.copy()
    tokens[:, :4] = tokens[:1, :4]
    chosen = jnp.asarray(np.broadcast_to(np.arange(S) >= 4, TOKENS.shape))
    traj = trajectory_of_tokens(tokens, np.ones_like(tokens), chosen, np.zeros(tokens.shape))
    shared = share_prefix(Batch(traj, traj.logp, traj.mask), 3, 2).traj
    step_scores = heads.make_process_reward_model(CONFIG)
    want = step_scores(params, {}, traj)[:, 3:]
    np.testing.assert_allclose(step_scores(params, {}, shared), want, rtol=1e-5, atol=1e-5)
