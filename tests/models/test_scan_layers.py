"""Scanned layers against the same layers one by one: numbers, gradients, samples, files, and what stays in memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open

from models import tiny
from rljax.data.prompts import pad_left
from rljax.models import decoder, hf, lora, peft, policy, stacks
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.train.shared_prefix import share_prefix
from rljax.types import Batch, PromptBatch, Resume, Sampling, trajectory_of_tokens

# Two periods of a window, none, and a mixture, and a layer that is left over.
PERIODS = DecoderConfig(
    23,
    hidden_size=16,
    num_layers=7,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=20,
    windows=(3, None, None) * 2 + (3,),
    qk_norm="head",
    moe=MoEConfig(4, 2, 12, layers=(2, 5), norm_topk_prob=True),
)
ALIKE = DecoderConfig(23, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=20)


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compiling is most of what a tiny model takes: half of it without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def scanned(config):
    return dataclasses.replace(config, scan_layers=True)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want):
    """To 1e-5 of the norm of all."""
    assert optax.tree.norm(jax.tree.map(jnp.subtract, got, want)) <= 1e-5 * optax.tree.norm(want)


def stacked(config, params):
    return stacks.stack(scanned(config).layer_scans(), params)


def read(directory, name):
    config = hf.read_config(tiny.make(directory, name), context=13)
    return config, hf.load(directory, config)


# ------------------------------------------------------------------------------------------------------------- periods


@pytest.mark.parametrize(
    ("kinds", "scans"),
    [
        ("AAAA", [["0123"]]),
        ("A", [["0"]]),
        ("AAABBB", [["012"], ["345"]]),
        ("AABAABA", [["03", "14", "25"], ["6"]]),
        ("ABABA", [["02", "13"], ["4"]]),
        ("BAAAAB", [["0"], ["1234"], ["5"]]),
        ("ABC", [["0"], ["1"], ["2"]]),
        ("AAAAAABB", [["012345"], ["67"]]),
    ],
)
def test_periods_are_found(kinds, scans):
    found = stacks.find_scans(kinds)
    assert [["".join(map(str, layers)) for layers in body] for body in found] == scans


def test_gemma_3_scans_its_periods():
    """26 layers, of which each sixth sees everything: four periods, and two layers that are left over."""
    config = dataclasses.replace(ALIKE, num_layers=26, windows=((512,) * 5 + (None,)) * 4 + (512,) * 2)
    assert [len(body) for body in config.layer_scans()] == [6, 1]
    assert sorted(layer for layers in config.layer_stacks() for layer in layers) == list(range(26))


def test_a_stack_has_a_name_that_tells_its_layers():
    layers = range(2, 24, 6)
    name = stacks.stack_name(layers)
    assert name == "from_2_to_20_by_6"
    assert list(stacks.layers_of(("layers", name, "mlp", "up"))) == list(layers)
    assert stacks.layers_of(("layers", 2, "mlp", "up")) is None
    assert stacks.layers_of(("embedding",)) is None


# --------------------------------------------------------------------------------------------------------------- files


# By day a plain stack, layers of two kinds, experts, and fused projections.
FILES_BY_DAY = ("plain", "qwen2_windows", "moe_mixed", "phi3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FILES_BY_DAY else pytest.mark.nightly) for name in tiny.CASES]
)
def test_files_are_those_of_single_layers(name, tmp_path):
    config, params = read(tmp_path / "made", name)
    found = hf.load(tmp_path / "made", scanned(config))
    equal(found, stacked(config, params))
    equal(stacks.unstack(found), params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, decoder.abstract(scanned(config)))

    hf.save(tmp_path / "written", scanned(config), found, source=tmp_path / "made", shard_bytes=9000)
    want = tiny.tensors_of(tiny.config_of(name), tiny.shapes_of(name))
    files = hf.stored_files(tmp_path / "written")
    assert files.keys() == want.keys()
    for name, file in files.items():
        with safe_open(file, framework="numpy") as opened:
            np.testing.assert_array_equal(opened.get_tensor(name), want[name])


@pytest.mark.parametrize("name", ["moe_mixed", "phi3"])
def test_a_stack_comes_to_the_host_one_layer_at_a_time(name, tmp_path):
    """And all experts of a layer at once."""
    config, params = read(tmp_path / "made", name)
    fetched = []

    def fetch(param, layer):
        found = hf.as_numpy(param, layer)
        fetched.append((id(param), layer, found.nbytes))
        return found

    hf.save(tmp_path / "written", scanned(config), stacked(config, params), tmp_path / "made", fetch=fetch)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sorted(size for _, _, size in fetched) == sorted(sizes)
    assert len({block[:2] for block in fetched}) == len(fetched)


@pytest.mark.parametrize("name", ["moe_mixed", "phi3"])
def test_each_device_reads_its_own_part(name, tmp_path):
    config, params = read(tmp_path, name)
    config = scanned(config)
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    places = meshes.param_shardings(mesh, decoder.param_axes(config), decoder.abstract(config))
    of_blocks = jax.tree.leaves(places["layers"])
    assert all(place.spec[0] is None for place in of_blocks)  # every device has a part of each layer
    assert not all(place.is_fully_replicated for place in of_blocks)
    parts = hf.load(tmp_path, config, places)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), parts, places))
    equal(parts, stacked(config, params))


def test_random_parameters_are_the_same():
    equal(decoder.init(scanned(PERIODS), jax.random.key(0)), stacked(PERIODS, decoder.init(PERIODS, jax.random.key(0))))


# ------------------------------------------------------------------------------------------------- numbers, gradients


def slope(config, params, ids):
    def loss(params):
        hidden, _ = decoder.forward(config, params, ids, jnp.arange(len(ids[0]))[None], jnp.ones_like(ids))
        return (decoder.logits(config, params, hidden) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen2_windows" else pytest.mark.nightly) for name in tiny.CASES]
)
def test_every_family_has_the_same_gradient(name, tmp_path):
    config, params = read(tmp_path, name)
    ids = jnp.asarray(tiny.tokens_of(name)[0][None])
    value, gradient = slope(config, params, ids)
    got, got_gradient = slope(scanned(config), stacked(config, params), ids)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    close(stacks.unstack(got_gradient), gradient)


P, N, L, T = 2, 3, 4, 8


def batch(config):
    """P prompts of up to L tokens, N completions of each; with a routing where there are experts."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, config.vocab_size, (P, L)).repeat(N, axis=0)
    tokens = np.concatenate([prompts, draw.integers(1, config.vocab_size, (P * N, T - L + 1))], axis=1)
    column = np.arange(T + 1)
    inside = (column >= np.array([0, 2]).repeat(N)[:, None]) & (column < draw.integers(L + 1, T + 2, (P * N, 1)))
    traj = trajectory_of_tokens(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(inside, jnp.int32),
        jnp.asarray(inside & (column >= L)),
        jnp.zeros(tokens.shape),
    )
    experts = np.argsort(draw.random((P, T, 2, 4)), axis=-1)[..., :2].repeat(N, axis=0)
    experts[:, L - 1 :] = np.argsort(draw.random((P * N, T - L + 1, 2, 4)), axis=-1)[..., :2]
    advantages = jnp.asarray(draw.normal(size=traj.mask.shape), jnp.float32)
    return Batch(traj.replace(routing=jnp.asarray(experts)), advantages, traj.mask)


def with_all_parts(config):
    """(trained, frozen): an adapter with numbers, a value head, a critic; for layers one by one or scanned."""
    plain = dataclasses.replace(config, scan_layers=False)
    params = policy.with_critic(policy.with_value_head(policy.init(plain, jax.random.key(0)), plain), plain)
    params["critic"]["value_head"] = jnp.linspace(-1, 1, config.hidden_size)
    if config.scan_layers:
        params["decoder"] = stacked(config, params["decoder"])
        params["critic"]["decoder"] = stacked(config, params["critic"]["decoder"])
    return policy.with_adapter(params, config, jax.random.key(1))


def moved(adapter):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapter)


@pytest.mark.nightly
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_a_policy_with_all_parts_has_the_same_gradient(remat, shared):
    """DoRA, a critic, replayed experts, windows, rows that share prefixes or are whole."""
    config = dataclasses.replace(PERIODS, adapter=LoraConfig(rank=2, use_dora=True), remat=remat)
    whole = batch(config)
    found = share_prefix(whole, L - 1, N) if shared else whole

    def gradient(config, params, frozen):
        model = policy.make_policy(config)

        def total(params):
            output = model(params, frozen, found.traj)
            return jnp.where(found.mask, found.advantages * (output.logp + output.values), 0.0).sum()

        return jax.jit(jax.value_and_grad(total))(params)

    params, frozen = with_all_parts(config)
    params = {**params, "lora": moved(params["lora"])}
    value, want = gradient(config, params, frozen)

    other, other_frozen = with_all_parts(scanned(config))
    other = {**other, "lora": stacked(config, params["lora"])}
    got, found_gradient = gradient(scanned(config), other, other_frozen)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for tree in (found_gradient["lora"], found_gradient["critic"]["decoder"]):
        assert stacks.are_stacked(tree)
    found_gradient["lora"] = stacks.unstack(found_gradient["lora"])
    found_gradient["critic"]["decoder"] = stacks.unstack(found_gradient["critic"]["decoder"])
    close(found_gradient, want)


def test_packed_segments_do_not_see_each_other():
    params = decoder.init(ALIKE, jax.random.key(0))
    ids = jnp.arange(10)[None] % 7
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    together, _ = decoder.forward(scanned(ALIKE), stacked(ALIKE, params), ids, positions, segments)
    want, _ = decoder.forward(ALIKE, params, ids, positions, segments)
    close(together, want)


def test_full_remat_keeps_one_layer_at_a_time():
    """What 16 layers take more than 8 is the hidden states between layers and their parameters' gradients, no more."""

    def temporaries(layers, remat):
        config = scanned(dataclasses.replace(ALIKE, num_layers=layers, remat=remat))
        ids = jnp.zeros((4, 64), jnp.int32)
        params = decoder.abstract(config)

        def loss(params):
            hidden, _ = decoder.forward(config, params, ids, ids, ids + 1)
            return (hidden**2).mean()

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    hidden = 4 * 64 * ALIKE.hidden_size * 4
    block = sum(x.size * 4 for x in jax.tree.leaves(decoder.abstract(dataclasses.replace(ALIKE, num_layers=1))))
    of_layer = (temporaries(16, "full") - temporaries(8, "full")) / 8
    assert of_layer <= 2 * hidden + 2 * block
    assert (temporaries(16, "none") - temporaries(8, "none")) / 8 > 10 * hidden


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("use_dora", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_adapters_begin_and_merge_the_same(use_dora):
    config = dataclasses.replace(PERIODS, adapter=LoraConfig(rank=2, use_dora=use_dora))
    base = decoder.init(config, jax.random.key(0))
    adapter = lora.init(config.adapter, base, jax.random.key(1))
    other = lora.init(config.adapter, stacked(config, base), jax.random.key(1))
    close(stacks.unstack(other), adapter)
    adapter = moved(adapter)
    merged = lora.merge(config.adapter, stacked(config, base), stacked(config, adapter))
    close(stacks.unstack(merged), lora.merge(config.adapter, base, adapter))
    axes = lora.adapter_axes(config.adapter, decoder.param_axes(scanned(config)), decoder.abstract(scanned(config)))
    of_leaves = jax.tree.leaves(
        jax.tree.map(lambda x, names: len(names) == x.ndim and names[0] == "layers", other, axes)
    )
    assert all(of_leaves)


def test_pefts_files_are_those_of_single_layers(tmp_path):
    base = tiny.make(tmp_path / "base", "qwen2_windows")
    config = dataclasses.replace(hf.read_config(base), adapter=LoraConfig(rank=2, targets=("attention/", "mlp/up")))
    adapter = moved(lora.init(config.adapter, decoder.abstract(config), jax.random.key(1)))
    peft.save_adapter(tmp_path / "one", config, adapter, base)
    peft.save_adapter(tmp_path / "stacked", scanned(config), stacked(config, adapter), base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stacked" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    _, read = peft.load_adapter(tmp_path / "stacked", scanned(config))
    equal(read, stacked(config, adapter))


def test_an_adapter_of_some_layers_cannot_be_scanned(tmp_path):
    base = tiny.make(tmp_path / "base", "qwen2")
    config = dataclasses.replace(
        hf.read_config(base), adapter=LoraConfig(rank=2, targets=("layers/1/attention/query",))
    )
    adapter = lora.init(config.adapter, decoder.abstract(config), jax.random.key(1))
    peft.save_adapter(tmp_path / "one", config, adapter, base)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\] are not adapted alike.*legal: scan_layers=False"):
        peft.load_adapter(tmp_path / "one", scanned(config))
    with pytest.raises(ValueError, match="no path matches 'layers/1/attention/query'"):
        lora.init(config.adapter, decoder.abstract(scanned(config)), jax.random.key(1))


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize(
    "how",
    ["static", pytest.param("slots", marks=pytest.mark.nightly), pytest.param("resumed", marks=pytest.mark.nightly)],
)
def test_the_samples_are_the_same(how):
    """Through a cache that is shared by a prompt's completions, refilled, or copied for requests; experts recorded."""
    tokens, mask = pad_left([[3, 4, 5, 6], [7, 8]], 4, 0)
    resume = Resume(requests=np.array([[0, 0], [1, 2], [0, 1], [1, 0]], np.int32)) if how == "resumed" else None
    prompts = PromptBatch(tokens, mask, np.arange(2, dtype=np.int32), [{}, {}], 2, resume)
    sampling = Sampling(temperature=0.8, n=4, max_tokens=20, stop=(2, 9), max_concurrent=3 if how == "slots" else None)
    params = decoder.init(PERIODS, jax.random.key(0))

    def draw(config, params):
        return sample(decoder.language_model(config), {"decoder": params}, {}, prompts, sampling, 0, 0)

    want = draw(PERIODS, params)
    got = draw(scanned(PERIODS), stacked(PERIODS, params))
    assert want.terminated.any()
    assert want.truncated.any()
    for name in ("inputs", "actions", "mask", "terminated", "routing"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-5, atol=1e-5)


def test_the_cache_is_written_in_place():
    """A step of decoding has room for a layer's columns beside the cache, not for another cache."""
    config = scanned(dataclasses.replace(ALIKE, num_layers=32))
    cache = jax.eval_shape(partial(decoder.init_cache, config, 8, 256))
    column = jax.ShapeDtypeStruct((8, 1), jnp.int32)

    def step(params, tokens, cache):
        return decoder.forward(config, params, tokens, tokens, tokens, cache)[1]

    compiled = jax.jit(step, donate_argnums=2).lower(decoder.abstract(config), column, cache).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache["layers"]))
    assert compiled.memory_analysis().temp_size_in_bytes < size / 4
