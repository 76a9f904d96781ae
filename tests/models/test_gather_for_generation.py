"""Weights gathered once a rollout: the same weights, whole over fsdp, and no longer gathered for each token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import device_memory
from experiments.common.hlo import collectives
from rljax.models import decoder, policy
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig, LoraWeight
from rljax.models.moe import MoEConfig
from rljax.rollouts import sampler
from rljax.train import mesh as meshes
from rljax.types import PromptBatch, Sampling

CONFIG = DecoderConfig(
    48,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    qkv_bias=True,
    dtype="bfloat16",
    gather_for_generation=True,
)
MIXTURE = dataclasses.replace(CONFIG, scan_layers=True, moe=MoEConfig(4, 2, 32, layers=(0, 1), norm_topk_prob=True))
STACKED_ADAPTER = dataclasses.replace(CONFIG, scan_layers=True, adapter=LoraConfig(rank=2, use_dora=True))
MANY = 1000  # turns of decoding, where the text does not say


def on_mesh(config, **sizes):
    """The config on a mesh, and its parameters there, trained and frozen."""
    mesh = meshes.make_mesh(**sizes)
    config = dataclasses.replace(config, hidden_sharding=meshes.hidden_sharding(mesh))
    params, frozen = policy.init(config, jax.random.key(0)), {}
    if config.adapter is not None:
        params, frozen = policy.with_adapter(params, config, jax.random.key(1))
        params = jax.tree.map(lambda x: x + 0.01, params)  # a new adapter's product is 0

    def placed(tree):
        return jax.device_put(tree, meshes.param_shardings(mesh, policy.logical_axes(config, tree), tree))

    return config, placed(params), {name: placed(part) for name, part in frozen.items() if part}


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CONFIG, {"fsdp": 8}),
        (MIXTURE, {"fsdp": 2, "tensor": 2, "expert": 2}),
        (STACKED_ADAPTER, {"fsdp": 4, "tensor": 2}),
    ],
)
def test_the_copy_is_the_weights_in_the_dtype_of_the_computation(config, sizes):
    config, params, frozen = on_mesh(config, **sizes)
    copy, _ = jax.jit(decoder.language_model(config).prepare)(params, frozen)
    weights = jax.jit(partial(decoder.full_params, config))(params, frozen)["decoder"]
    axes = decoder.param_axes(config)

    def check(names, mine, given):
        weight = mine.weight if isinstance(mine, LoraWeight) else mine
        assert weight.sharding.is_equivalent_to(without_fsdp(config, names, weight.shape), weight.ndim)
        for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(given), strict=True):
            if "embed" in names and one.dtype == config.dtype:
                other = other.astype(config.dtype)
            np.testing.assert_array_equal(one, other)

    jax.tree.map(check, axes, copy, weights, is_leaf=lambda x: isinstance(x, tuple))
    moved = jax.tree.leaves(copy["layers"])
    assert all(x.dtype == jnp.bfloat16 for x in moved if x.size >= config.hidden_size**2)


def without_fsdp(config, names, shape):
    """Where a weight lies after gathering: tables of the vocabulary as before."""
    names = [None if name == "embed" else name for name in names]
    return meshes.sharding_of(config.hidden_sharding.mesh, names, shape)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (dataclasses.replace(CONFIG, scan_layers=True), {"fsdp": 4, "tensor": 2}),
        pytest.param(MIXTURE, {"fsdp": 4, "expert": 2}, marks=pytest.mark.nightly),
    ],
)
def test_no_weights_are_gathered_for_each_token(config, sizes):
    """Scanned layers: of unrolled ones XLA takes the gathers out of the loop by itself, at least on CPU."""
    P, L = 8, 3
    tokens = np.ones((P, L), np.int32)
    prompts = PromptBatch(tokens, tokens > 0, np.arange(P, dtype=np.int32), [{}] * P, P)
    sampling = Sampling(n=1, max_tokens=6)

    def gathered_in_loop(config) -> float:
        """Bytes of weights that are gathered for a token: of all arrays that are no smaller than a matrix."""
        config, params, frozen = on_mesh(config, **sizes)
        arguments = (params, frozen, sampler.to_device(prompts, 0), sampling, jnp.int32(0))
        lowered = sampler.sample_on_devices.lower(decoder.language_model(config), *arguments)
        smallest = config.hidden_size**2 * 2
        found = collectives(lowered.compile().as_text(), MANY)
        return sum(x.bytes * x.times / MANY for x in found if x.times >= MANY and x.bytes >= smallest)

    before = gathered_in_loop(dataclasses.replace(config, gather_for_generation=False))
    assert before >= device_memory.gathered_bytes(config, meshes.make_mesh(**sizes))
    assert gathered_in_loop(config) == 0
