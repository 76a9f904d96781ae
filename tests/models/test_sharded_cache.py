"""The KV cache on a mesh: rows and heads stay where they are, and rows that are taken move without being collected."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import caches, decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.moe import MoEConfig
from rljax.rollouts import sampler
from rljax.train import mesh as meshes
from rljax.types import PromptBatch, Resume, Sampling

CONFIG = DecoderConfig(
    32,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    moe=MoEConfig(4, 2, 8, layers=(1, 3), norm_topk_prob=True),
)
MESH = {"fsdp": 4, "tensor": 2}
COLUMNS = 6


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def on_mesh(config, **sizes):
    return dataclasses.replace(config, hidden_sharding=meshes.hidden_sharding(meshes.make_mesh(**sizes)))


def largest_collected(compiled) -> int:
    """Number of the elements of the largest array that is collected from several devices."""
    sizes = [0]
    for line in compiled.as_text().splitlines():
        found = re.search(r" = (.*?) all-gather(-start)?\(", line)
        shapes = re.findall(r"\[([\d,]*)\]", found[1]) if found else []
        sizes += [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]
    return max(sizes)


def filled_cache(config, rows):
    """A cache in which the numbers of no two rows are the same."""
    cache = decoder.init_cache(config, rows, COLUMNS)

    def fill(x):
        return (jnp.arange(x.size) % 251).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(fill, cache)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("rows", "taken"),
    [(8, [5, 0, 7, 7, 2, 1, 3, 3]), (8, [6]), (8, [1, 7, 4, 4, 0, 2]), (6, [5, 5, 1, 0, 3, 2, 2, 4]), (6, [5, 1])],
)
def test_rows_are_taken_from_where_they_are(rows, taken, scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    cache = filled_cache(config, rows)
    sharding = decoder.language_model(on_mesh(config, **MESH)).gather.keywords["sharding"]

    @jax.jit
    def take(cache, chosen):
        return caches.gather(caches.constrain(cache, sharding), chosen, sharding)

    chosen = jnp.array(taken)
    jax.tree.map(np.testing.assert_array_equal, take(cache, chosen), caches.gather(cache, chosen))
    if len(taken) == 6:  # the result of a whole program cannot be sharded unevenly
        return
    layer = cache["layers"][0]["key"]
    assert largest_collected(take.lower(cache, chosen).compile()) < layer.size / 2


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ("static", MESH),
        ("resumed", MESH),
        ("slots", MESH),
        ("static", {"fsdp": 2, "tensor": 4}),  # 2 heads over 4 devices
        ("static", {"fsdp": 2, "sequence": 2, "tensor": 2}),
    ],
)
def test_a_rollout_collects_no_cache_and_samples_the_same(how, sizes):
    P, n, L, N = 8, 2, 4, 40
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, 32, (P, L)).astype(np.int32)
    resume = None
    if how == "resumed":
        requests = np.stack([draw.permutation(P * n) % P, np.arange(P * n) % n], axis=1)
        resume = Resume(requests=requests.astype(np.int32))
    mask = np.arange(L) >= draw.integers(0, 3, (P, 1))
    prompts = PromptBatch(tokens, mask, np.arange(P, dtype=np.int32), [{}] * P, P, resume)
    sampling = Sampling(n=n, max_tokens=N, stop=(2, 5), max_concurrent=8 if how == "slots" else None)
    params = {"decoder": decoder.init(dataclasses.replace(CONFIG, scan_layers=True), jax.random.key(0))}

    def arguments(config):
        return decoder.language_model(config), params, {}, sampler.to_device(prompts, 0), sampling, jnp.int32(0)

    config = dataclasses.replace(CONFIG, scan_layers=True)
    want, _ = sampler.sample_on_devices(*arguments(config))
    run = partial(sampler.sample_on_devices, *arguments(on_mesh(config, **sizes)))
    got, _ = run()
    for name in ("inputs", "actions", "mask", "terminated", "routing"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-4, atol=1e-5)

    compiled = sampler.sample_on_devices.lower(*arguments(on_mesh(config, **sizes))).compile()
    of_prompts = P * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * L
    of_rows = P * n * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 16  # the first chunk's
    assert largest_collected(compiled) < min(of_prompts, of_rows)
