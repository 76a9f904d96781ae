"""Adapters against the formulas of their papers in float64, and in every place where a model with one is used."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algorithms import grpo, with_kl
from rljax.models import decoder, layers, lora, policy
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import PromptBatch, Sampling, TrainState, trajectory_of_tokens
from tests import bounds

RANK, ALPHA = 3, 7.0
VARIANTS = {
    "lora": ({}, ALPHA / RANK),
    "rslora": ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
    "dora": ({"use_dora": True}, ALPHA / RANK),
    "rsdora": ({"use_dora": True, "use_rslora": True}, ALPHA / math.sqrt(RANK)),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
CONFIG = decoder.DecoderConfig(13, 12, 2, 2, 1, 8, 20, qkv_bias=True, mlp_bias=True)
# Half the time of a compilation, which is all that a test of a tiny model takes.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IDS = jnp.array([[1, 5, 2, 2, 9, 12, 0, 3]])


def config_of(variant, **changes):
    return dataclasses.replace(CONFIG, adapter=LoraConfig(RANK, ALPHA, **VARIANTS[variant][0]), **changes)


def stirred(tree, seed):
    """With noise on every leaf: no zeros are left, and no magnitude is the norm of W."""
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * random.standard_normal(x.shape), x.dtype), tree)


def made(variant):
    """(config, the base's decoder, an adapter as after some training)."""
    config = config_of(variant)
    base = stirred(decoder.init(config, jax.random.key(0)), 0)
    return config, base, stirred(lora.init(config.adapter, base, jax.random.key(1)), 1)


def forward(config, params, frozen):
    whole = decoder.full_params(config, params, frozen)["decoder"]
    return decoder.forward(config, whole, IDS, jnp.arange(8)[None], jnp.ones_like(IDS))[0]


hidden = compiled(forward, static_argnums=0)


def formula(variant, weight, leaf):
    """The matrix [in out] that the adapter makes of the weight, in float64; and of DoRA the norms m is divided by."""
    out = math.prod(leaf["up"].shape[1:])
    W, A, B = (np.asarray(x, np.float64) for x in (weight, leaf["down"], leaf["up"]))
    W = W.reshape(-1, out) + VARIANTS[variant][1] * A.reshape(-1, RANK) @ B.reshape(RANK, out)
    norms = np.linalg.norm(W, axis=0)
    return np.asarray(leaf["magnitude"], np.float64).reshape(-1) * W / norms if "dora" in variant else W, norms


def close(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


# --------------------------------------------------------------------------------------------------------- the formula


@EVERY
@pytest.mark.parametrize(
    ("block", "name", "inputs"), [("attention", "query", 1), ("attention", "out", 2), ("mlp", "down", 1)]
)
def test_a_projection_and_its_gradient_are_the_formula(variant, block, name, inputs):
    """DoRA's norms carry no gradient (§4.3)."""
    config, base, adapter = made(variant)
    weight, leaf = (tree["layers"][1][block][name] for tree in (base, adapter))
    random = np.random.RandomState(2)
    x = random.standard_normal((2, 5, *weight.shape[:inputs]))
    c = random.standard_normal((2, 5, *weight.shape[inputs:]))
    bias = random.standard_normal(weight.shape[inputs:])

    def project(leaf):
        one = {"layers": {1: {block: {name: leaf}}}}
        attached = lora.attach(config.adapter, base, one)["layers"][1][block][name]
        out = layers.project(jnp.float32(x), attached, jnp.float32(bias), inputs)
        return (jnp.float32(c) * out).sum(), out

    gradient, out = compiled(jax.grad(project, has_aux=True))(leaf)
    X, C, s = x.reshape(10, -1), c.reshape(10, -1), VARIANTS[variant][1]
    W, norms = formula(variant, weight, leaf)
    close(out, (X @ W).reshape(c.shape) + bias)
    A, B = np.float64(leaf["down"]).reshape(-1, RANK), np.float64(leaf["up"]).reshape(RANK, -1)
    gain = np.float64(leaf["magnitude"]).reshape(-1) / norms if "dora" in variant else 1
    want = {"down": s * X.T @ (C * gain) @ B.T, "up": s * (X @ A).T @ (C * gain)}
    if "dora" in variant:
        want["magnitude"] = (C * (X @ W) / (gain * norms)).sum(axis=0)
    close(gradient, {part: g.reshape(leaf[part].shape) for part, g in want.items()}, 1e-4)


@EVERY
def test_attached_is_merged_is_the_formula(variant):
    config, base, adapter = made(variant)
    merged = lora.merge(config.adapter, base, adapter)
    for layer, blocks in adapter["layers"].items():
        for block, leaves in blocks.items():
            for name, leaf in leaves.items():
                weight = base["layers"][layer][block][name]
                close(merged["layers"][layer][block][name], formula(variant, weight, leaf)[0].reshape(weight.shape))
    attached = hidden(config, {"lora": adapter}, {"base": {"decoder": base}})
    of_merged = hidden(config, {"decoder": merged}, {})
    rounding = bounds.of_decoder(config, attached.shape[1], np.abs(attached).max())
    np.testing.assert_allclose(attached, of_merged, rtol=0, atol=rounding)
    assert np.abs(attached - hidden(config, {"decoder": base}, {})).max() > 0.1


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_on_one_device_a_rollout_in_float32_merges_the_adapter_and_fuses_projections(variant):
    """What its forward pass computes is what the trainer's does; the base, a reference, is fused without a merge."""
    config, base, adapter = made(variant)
    lm = decoder.language_model(config, devices=1)
    frozen = {"base": {"decoder": base}}

    @compiled
    def of_rollout(params):
        prepared, _ = lm.prepare(params, frozen)
        assert "fused" in prepared["layers"][1]["attention"]
        assert not any(isinstance(x, lora.LoraWeight) for x in jax.tree.leaves(prepared, is_leaf=is_adapted))
        return lm.forward(prepared, {}, IDS, jnp.arange(8)[None], jnp.ones_like(IDS))[0]

    for params in ({"lora": adapter}, {}):
        want = hidden(config, params, frozen)
        rounding = bounds.of_decoder(config, want.shape[1], np.abs(want).max())
        np.testing.assert_allclose(of_rollout(params), want, rtol=0, atol=rounding)


def is_adapted(x):
    return isinstance(x, lora.LoraWeight)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"batch_invariant": True, "head_dim": 16}])
def test_elsewhere_a_rollout_multiplies_as_the_trainer_does(changes):
    """In bfloat16 a merge keeps most of a base as it was; batch-invariant numbers have the trainer's bits."""
    config = config_of("lora", **changes)
    base = jax.eval_shape(partial(policy.init, config), jax.random.key(0))
    params, frozen = jax.eval_shape(lambda base, key: policy.with_adapter(base, config, key), base, jax.random.key(1))
    prepared, _ = jax.eval_shape(decoder.language_model(config, devices=1).prepare, params, frozen)
    assert is_adapted(prepared["layers"][0]["attention"]["query"])


def test_a_merge_in_bfloat16_rounds_small_changes_away():
    config, base, adapter = made("lora")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    small = jax.tree.map(lambda x: 0.01 * x, adapter)
    weight, merged = (tree["layers"][0]["mlp"]["up"] for tree in (half, lora.merge(config.adapter, half, small)))
    exact = lora.merge(config.adapter, base, small)["layers"][0]["mlp"]["up"]
    assert (exact != base["layers"][0]["mlp"]["up"]).all()
    assert (merged == weight).mean() > 0.7


@EVERY
def test_merging_is_undone_where_it_can_be(variant):
    config, base, adapter = made(variant)
    merged = lora.merge(config.adapter, base, adapter)
    if "dora" in variant:
        with pytest.raises(ValueError, match="merged DoRA adapter cannot be removed: keep the base"):
            lora.unmerge(config.adapter, merged, adapter)
    else:
        close(lora.unmerge(config.adapter, merged, adapter), base, 1e-6)


def test_merging_keeps_the_dtype():
    config, base, adapter = made("dora")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = lora.merge(config.adapter, half, adapter)
    jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail(f"{a.dtype}"), merged, half)
    close(merged["layers"][0]["mlp"]["up"], lora.merge(config.adapter, base, adapter)["layers"][0]["mlp"]["up"], 2e-2)


# ------------------------------------------------------------------------------------------------------ what is adapted


def adapted(*patterns, config=CONFIG):
    return ["/".join(map(str, path)) for path in lora.targets(LoraConfig(targets=patterns), decoder.abstract(config))]


def test_patterns_say_what_is_adapted():
    attention, mlp = ["key", "out", "query", "value"], ["down", "gate", "up"]
    every = [f"layers/{i}/{b}/{n}" for i in range(2) for b, ns in (("attention", attention), ("mlp", mlp)) for n in ns]
    assert adapted(*LoraConfig().targets) == every
    assert adapted("query", "value$") == [f"layers/{i}/attention/{n}" for i in range(2) for n in ("query", "value")]
    assert adapted("layers/1/.*(out|up)") == ["layers/1/attention/out", "layers/1/mlp/up"]


@pytest.mark.parametrize("barren", ["embedding", "query_bias", "norm", "layers/2/", "q_proj"])
def test_a_pattern_that_finds_nothing_is_an_error(barren):
    legal = ", ".join(f"layers/*/{n}" for n in ("attention/key", "attention/out", "attention/query"))
    with pytest.raises(ValueError, match=re.escape(f"no path matches '{barren}'; there are {legal}")):
        adapted("attention/", barren)


MIXTURE = dataclasses.replace(CONFIG, moe=MoEConfig(4, 2, 9, (1,), True))


def test_routers_and_experts_are_not_adapted():
    assert [path for path in adapted("layers", config=MIXTURE) if "mlp" in path] == [
        f"layers/0/mlp/{n}" for n in ("down", "gate", "up")
    ]
    with pytest.raises(ValueError, match=r"no path matches 'layers/1/mlp/'; there are layers/\*/attention/key"):
        adapted("layers/1/mlp/", config=MIXTURE)


def test_adapters_lie_as_their_weights_do():
    config = config_of("dora", num_layers=1, num_heads=4, num_kv_heads=2)
    shapes, axes = decoder.abstract(config), decoder.param_axes(config)
    mesh, make = meshes.make_mesh(2, 2, 2), partial(lora.init, config.adapter)
    of_weights = meshes.param_shardings(mesh, axes, shapes)["layers"][0]
    like = jax.eval_shape(make, shapes, jax.random.key(1))
    places = meshes.param_shardings(mesh, lora.adapter_axes(config.adapter, axes, shapes), like)
    for block, name, inputs in (("attention", "key", 1), ("attention", "out", 2), ("mlp", "up", 1), ("mlp", "down", 1)):
        spec = tuple(of_weights[block][name].spec)
        assert any(spec)
        want = {"down": (*spec[:inputs], None), "up": (None, *spec[inputs:]), "magnitude": spec[inputs:]}
        assert {part: tuple(place.spec) for part, place in places["layers"][0][block][name].items()} == want

    base = decoder.init(config, jax.random.key(0))
    sharded = compiled(make, out_shardings=places)(base, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), sharded, places))
    close(sharded, compiled(make)(base, jax.random.key(1)), 1e-6)


# --------------------------------------------------------------------------------------------------------------- in use


def trajectory():
    random = np.random.RandomState(0)
    segments = np.array([[1] * 9, [0] * 2 + [1] * 7, [1] * 4 + [2] * 5])
    chosen = jnp.asarray((segments > 0) & (np.arange(9) >= 3))
    return trajectory_of_tokens(random.randint(0, 13, (3, 9)), segments, chosen, np.zeros((3, 9), np.float32))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_first_an_adapter_changes_nothing(variant, dtype):
    """And {} as parameters is the base: the reference without a copy."""
    config = config_of(variant, dtype=dtype)
    base = jax.tree.map(lambda x: x.astype(dtype), policy.init(config, jax.random.key(0)))
    params, frozen = policy.with_adapter(base, config, jax.random.key(1))
    assert params.keys() == {"lora"}
    assert all(a is b for a, b in zip(jax.tree.leaves(frozen["base"]), jax.tree.leaves(base), strict=True))
    model, traj = policy.make_policy(config), trajectory()
    annotate = policy.make_annotate(model, ("ref_logp", "old_logp"))
    state = TrainState(0, params, None, jax.random.key(0), frozen=frozen)
    first, stirred_up = (annotate(state.replace(params=p), traj) for p in (params, stirred(params, 1)))
    alone = np.where(traj.mask, compiled(model)(base, {}, traj).logp, 0)
    rounding = bounds.of_logp(config, traj.replace(logp=alone)) if dtype == "float32" else 1e-2
    for got in (first.ref_logp, first.old_logp, stirred_up.ref_logp):
        np.testing.assert_allclose(np.where(traj.mask, got, 0), alone, rtol=0, atol=rounding)
    assert np.abs(np.where(traj.mask, stirred_up.old_logp, 0) - alone).max() > 0.1


def test_an_adapter_of_which_the_config_knows_nothing_is_an_error():
    _, base, adapter = made("lora")
    with pytest.raises(ValueError, match=r"params has an adapter .* config\.adapter is None"):
        hidden(CONFIG, {"lora": adapter}, {"base": {"decoder": base}})


def test_only_the_adapter_learns():
    """A mixture's attention: what the sampler said, the trainer says; then two updates."""
    attention = LoraConfig(RANK, ALPHA, ("attention/",), use_rslora=True)
    config = dataclasses.replace(CONFIG, num_layers=1, moe=MoEConfig(4, 2, 9, (0,), True), adapter=attention)
    base = policy.init(config, jax.random.key(0))
    params, frozen = policy.with_adapter(base, config, jax.random.key(1))
    params, before = stirred(params, 1), jax.device_get(base)
    start = jax.device_get(params)
    rows = PromptBatch(np.ones((2, 3), np.int32), np.ones((2, 3), bool), np.arange(2, dtype=np.int32), [{}] * 2, 2)
    traj = sample(decoder.language_model(config), params, frozen, rows, Sampling(n=2, max_tokens=5), 0, 0)

    model, algorithm, optimizer = policy.make_policy(config), with_kl(grpo(), 0.1), optax.adam(1e-2)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(2), frozen=frozen)
    traj = policy.make_annotate(model, (*algorithm.needs, "old_logp"))(state, traj)
    assert np.abs(np.where(traj.mask, traj.old_logp - traj.logp, 0)).max() <= bounds.of_logp(config, traj)
    assert np.abs(np.where(traj.mask, traj.ref_logp - traj.logp, 0)).max() > 0.1
    batch = algorithm.credit(traj.replace(rewards=traj.mask * np.float32(traj.actions % 5)), {})
    update = make_update(policy_objective(model, algorithm), optimizer)
    for _ in range(2):
        state, _ = update(state, batch)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, state.frozen["base"], before)


def test_layers_that_are_computed_again_have_the_same_gradient():
    """On a base of bfloat16: masters and gradients of the adapter are float32."""
    config, base, adapter = made("dora")
    frozen = {"base": {"decoder": jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)}}

    @partial(compiled, static_argnums=0)
    def gradient(remat, adapter):
        changed = dataclasses.replace(config, dtype="bfloat16", remat=remat)
        return jax.grad(lambda params: (forward(changed, params, frozen).astype(float) ** 2).mean())({"lora": adapter})

    kept, again = gradient("none", adapter), gradient("full", adapter)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    close(again, kept, 1e-2)


def test_no_gradient_of_the_base_is_computed():
    """No product in the whole gradient is as large as a weight: neither A B nor a weight's own gradient."""
    config, base, adapter = made("lora")

    def loss(params, frozen):
        return (forward(config, params, frozen) ** 2).sum()

    def products(*args):
        text = jax.jit(jax.grad(loss)).lower(*args).as_text()
        sizes = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
        return {tuple(map(int, size.split("x"))) for size in sizes}

    weights = {(12, 16), (12, 8), (16, 12), (12, 20), (20, 12)}
    assert not products({"lora": adapter}, {"base": {"decoder": base}}) & weights
    found = products({"lora": adapter, "decoder": base}, {})
    assert {size for w in weights for size in (w, w[::-1])} & found
