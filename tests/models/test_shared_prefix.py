"""Rows that continue a shared prefix: the numbers and gradients of the whole rows, for every kind of layer."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.models import decoder, policy, rope
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig
from rljax.train.shared_prefix import is_prefix_shared, share_prefix
from rljax.types import Batch, trajectory_of_tokens

PROMPTS, N, L, T = 3, 4, 5, 9  # the last token of a prompt is read by each of its rows
TINY = DecoderConfig(23, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24)
CONFIGS = {
    "llama": TINY,
    "a window, capped scores": dataclasses.replace(TINY, windows=(3, None), attention_softcap=2.0),
    "norms of queries and keys, no positions in a layer": dataclasses.replace(
        TINY, qk_norm="head", qkv_bias=True, ropes=(None, rope.default(100.0, 8))
    ),
    "experts": dataclasses.replace(TINY, moe=MoEConfig(4, 2, 12, layers=(1,), norm_topk_prob=True)),
    "recomputed": dataclasses.replace(TINY, remat="full"),
    "batch-invariant": dataclasses.replace(TINY, head_dim=16, batch_invariant=True),
}


def batch(config):
    """Prompts of 2 to 5 tokens padded on the left, N completions of each, some of which end early."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, config.vocab_size, (PROMPTS, L)).repeat(N, axis=0)
    tokens = np.concatenate([prompts, draw.integers(1, config.vocab_size, (PROMPTS * N, T - L + 1))], axis=1)
    column = np.arange(T + 1)
    lengths = np.array([5, 2, 4]).repeat(N)[:, None]
    ends = draw.integers(L + 1, T + 2, (PROMPTS * N, 1))
    inside = (column >= L - lengths) & (column < ends)
    routing = None
    if config.moe is not None:
        experts = np.argsort(draw.random((PROMPTS, T, 1, 4)), axis=-1)[..., :2].repeat(N, axis=0)
        experts[:, L - 1 :] = np.argsort(draw.random((PROMPTS * N, T - L + 1, 1, 4)), axis=-1)[..., :2]
        routing = jnp.asarray(experts)
    traj = trajectory_of_tokens(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(inside, jnp.int32),
        jnp.asarray(inside & (column >= L)),
        jnp.zeros(tokens.shape),
        temperature=jnp.asarray(draw.uniform(0.5, 2.0, tokens.shape), jnp.float32),
    )
    advantages = jnp.asarray(draw.normal(size=traj.mask.shape), jnp.float32)
    return Batch(traj.replace(routing=routing), advantages, traj.mask)


def gradient(config, params, found):
    """Σ A (log π + V) over the decisions, and its gradient."""
    model = policy.make_policy(config)

    def total(params):
        output = model(params, {}, found.traj)
        return jnp.where(found.mask, found.advantages * (output.logp + output.values), 0.0).sum()

    return jax.jit(jax.value_and_grad(total))(params)  # one program: operation by operation it takes longer


@lru_cache
def of_whole_rows(name):
    """Config, parameters, batch, and the sum and its gradient of the rows as they are."""
    config = CONFIGS[name]
    params = jax.jit(lambda key: policy.with_value_head(policy.init(config, key), config))(jax.random.key(0))
    params = policy.with_critic(params, config)
    params["critic"]["value_head"] = jnp.linspace(-1, 1, config.hidden_size)
    whole = batch(config)
    return config, params, whole, *gradient(config, params, whole)


# By day every kind of layer with whole groups, and one kind with each other number of rows that share.
BY_DAY = {*((name, N) for name in CONFIGS), ("llama", 2), ("llama", 1)}
CASES = [(name, share) for name in CONFIGS for share in (N, 2, 1)]


@pytest.mark.parametrize(
    ("name", "share"), [pytest.param(*case, marks=() if case in BY_DAY else pytest.mark.nightly) for case in CASES]
)
def test_the_gradient_is_that_of_whole_rows(name, share):
    config, params, whole, want, want_gradient = of_whole_rows(name)
    assert is_prefix_shared(whole.traj, L - 1, share)
    shared = share_prefix(whole, L - 1, share)
    assert shared.traj.prefix.inputs.shape == (PROMPTS * N // share, L - 1)
    assert shared.mask.shape == (PROMPTS * N, T - L + 1)
    got, got_gradient = gradient(config, params, shared)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, got_gradient, want_gradient))
    assert apart < 1e-5 * optax.tree.norm(want_gradient)


def test_an_adapter_sees_the_same():
    config = dataclasses.replace(TINY, adapter=LoraConfig(rank=2))
    params = policy.init(TINY, jax.random.key(0))
    trained, frozen = policy.with_adapter(params, config, jax.random.key(1))
    whole = batch(config)
    shared = share_prefix(whole, L - 1, N)
    model = jax.jit(policy.make_policy(config))
    want = model(trained, frozen, whole.traj).logp[:, L - 1 :]
    got = model(trained, frozen, shared.traj).logp
    np.testing.assert_allclose(got[shared.mask], want[shared.mask], rtol=1e-5, atol=1e-5)


def test_the_exact_divergence_sees_the_same():
    old = policy.init(TINY, jax.random.key(0))
    new = policy.init(TINY, jax.random.key(1))
    whole = batch(TINY)
    shared = share_prefix(whole, L - 1, N)
    divergence = jax.jit(policy.make_divergence(TINY))
    want = divergence(new, old, {}, whole.traj)[:, L - 1 :]
    got = divergence(new, old, {}, shared.traj)
    np.testing.assert_allclose(got[shared.mask], want[shared.mask], rtol=1e-5, atol=1e-6)


def test_a_prefix_and_a_cache_are_refused():
    prefix = share_prefix(batch(TINY), L - 1, N).traj.prefix
    tokens = jnp.ones((N * PROMPTS, 1), jnp.int32)
    cache = decoder.init_cache(TINY, N * PROMPTS, 4)
    params = decoder.init(TINY, jax.random.key(0))
    for two in ({"cache": cache, "prefix": prefix}, {"cache": cache, "context": tokens}):
        with pytest.raises(ValueError, match="legal: one of cache, prefix and context"):
            decoder.forward(TINY, params, tokens, tokens, tokens, **two)
