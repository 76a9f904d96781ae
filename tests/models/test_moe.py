"""Experts over several devices against all experts on one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from experiments.common.hlo import collectives
from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.moe import MoEConfig, moe_mlp, sharded_moe_mlp
from rljax.train.mesh import hidden_sharding, make_mesh

E, K, D, F = 8, 3, 6, 4
CASES = {  # mesh, rows and columns, number of experts
    "experts": ({"fsdp": 1, "expert": 8}, (8, 4), E),
    "rows and widths": ({"fsdp": 2, "expert": 2, "tensor": 2}, (8, 4), E),
    "copies and columns": ({"data": 2, "fsdp": 1, "expert": 2, "sequence": 2}, (8, 4), E),
    "experts, rows divide over nothing": ({"fsdp": 1, "expert": 8}, (5, 3), E),
    "copies and columns, rows divide over nothing": (
        {"data": 2, "fsdp": 1, "expert": 2, "sequence": 2},
        (5, 3),
        E,
    ),
    "experts divide over nothing": ({"fsdp": 2, "expert": 4}, (5, 3), 6),
}


def inputs(B, T, E=E, D=D):
    draw = np.random.RandomState(0)
    chosen = np.argsort(draw.random_sample((B, T, E)), axis=-1)[..., :K]
    shapes = ((B, T, D), (B, T, K), (E, D, F), (E, D, F), (E, F, D))
    x, weights, *experts = (jnp.float32(draw.standard_normal(shape)) for shape in shapes)
    return x, jnp.asarray(chosen, jnp.int32), weights, experts


def by_hand(x, chosen, weights, experts):
    """Each token and each of its experts by itself, in float64."""
    x, weights, gate, up, down = (np.asarray(found, np.float64) for found in (x, weights, *experts))
    out = np.zeros(x.shape)
    for b, t, k in np.ndindex(chosen.shape):
        e = chosen[b, t, k]
        out[b, t] += weights[b, t, k] * (np.tanh(x[b, t] @ gate[e]) * (x[b, t] @ up[e])) @ down[e]
    return out


@pytest.mark.parametrize(("sizes", "shape", "count"), CASES.values(), ids=CASES)
def test_experts_on_several_devices(sizes, shape, count):
    """Values by hand, gradients of those on one device."""
    x, chosen, weights, experts = inputs(*shape, E=count)
    out_weights = jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    def total(sharding, x, weights, *experts):
        out = sharded_moe_mlp(x, chosen, weights, *experts, jnp.tanh, sharding)
        return (out_weights * out).sum(), out

    def gradient(sharding):
        slope = jax.value_and_grad(partial(total, sharding), argnums=tuple(range(5)), has_aux=True)
        return jax.jit(slope)(x, weights, *experts)

    (_, got), slopes = gradient(hidden_sharding(make_mesh(**sizes)))
    want = by_hand(x, chosen, weights, experts)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    _, want_slopes = gradient(None)
    for slope, want in zip(slopes, want_slopes, strict=True):
        assert np.linalg.norm(slope - want) <= 1e-5 * np.linalg.norm(want)


def test_without_an_axis_of_experts_devices_exchange_weights_alone():
    """XLA by itself sums and collects the tokens of all devices on every device, to sort them there."""
    mesh = make_mesh(fsdp=8)
    x, chosen, weights, experts = inputs(8, 4, D=8)
    rows, inner, outer = (NamedSharding(mesh, jax.P(*[None] * axis, "fsdp")) for axis in range(3))
    placed = jax.device_put((x, chosen, weights, *experts), (rows, rows, rows, inner, inner, outer))
    layer = jax.jit(partial(sharded_moe_mlp, activation=jnp.tanh, sharding=hidden_sharding(mesh)))
    compiled = layer.lower(*placed).compile()
    sent = collectives(compiled.as_text())
    assert {one.kind for one in sent} == {"all-gather"}
    assert sum(one.bytes for one in sent) == sum(weight.nbytes for weight in experts)
    want = by_hand(x, chosen, weights, experts)
    assert np.linalg.norm(compiled(*placed) - want) <= 1e-5 * np.linalg.norm(want)


def test_all_tokens_may_choose_the_same_expert():
    x, chosen, weights, experts = inputs(8, 4)
    chosen = jnp.broadcast_to(jnp.array([2, 5, 7]), chosen.shape)
    got = sharded_moe_mlp(x, chosen, weights, *experts, jnp.tanh, hidden_sharding(make_mesh(fsdp=2, expert=4)))
    want = by_hand(x, chosen, weights, experts)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_what_is_no_expert_adds_nothing():
    x, chosen, weights, experts = inputs(1, 4)
    chosen = chosen.at[0, 1].set(E).at[0, 2, 0].set(-1)
    kept = weights * ((chosen >= 0) & (chosen < E))
    got = moe_mlp(x[0], chosen[0], weights[0], *experts, jnp.tanh)
    np.testing.assert_allclose(got, by_hand(x, chosen % E, kept, experts)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_decoder_with_experts_on_several_devices(scan_layers):
    moe = MoEConfig(E, K, F, layers=(0, 1), norm_topk_prob=True)
    config = DecoderConfig(23, 8, 2, 2, 2, 4, 12, moe=moe, scan_layers=scan_layers, remat="full")
    ids = jnp.arange(8 * 5).reshape(8, 5) % 23
    params = decoder.init(config, jax.random.key(0))

    def gradient(config):
        def loss(params):
            hidden, _ = decoder.forward(config, params, ids, jnp.zeros_like(ids) + jnp.arange(5)[None], 0 * ids + 1)
            return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, want = gradient(config)
    sharded = dataclasses.replace(config, hidden_sharding=hidden_sharding(make_mesh(fsdp=2, expert=2, tensor=2)))
    got, found = gradient(sharded)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, found, want)) <= 1e-5 * optax.tree.norm(want)
