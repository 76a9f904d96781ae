"""Every implementation of attention against the plain one, and which of them is taken where."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import (
    AttentionMask,
    attend,
    choose_implementation,
    divides_over,
    flash_kernel,
    splash_attention,
)
from rljax.train.mesh import hidden_sharding, make_mesh

T = 128


@pytest.fixture(scope="module")
def texts():
    """Queries, keys and values of one row, 4 heads on 2, and where they stand: two texts, then padding."""
    random, lengths = np.random.RandomState(0), (50, 41, T - 91)
    query, key, value = (np.float32(random.standard_normal((1, T, heads, 24))) for heads in (4, 2, 2))
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    mask = AttentionMask(*(jnp.asarray(x, jnp.int32) for x in (positions, np.repeat([1, 2, 0], lengths)[None])))
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), mask


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (17, 2.0)])
def test_splash_is_dense(texts, window, softcap):
    query, key, value, mask = texts
    want = attend(query, key, value, mask, 0.3, window, softcap, "xla")
    got = splash_attention(query, key, value, mask, 0.3, window, softcap, interpret=True)
    real = np.asarray(mask.segments) > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("columns", "window", "softcap"), [(T, None, None), (T, 17, 2.0), (T - 5, None, None)])
def test_splash_compiles_for_a_tpu(texts, columns, window, softcap):
    call = partial(attend, scale=0.3, window=window, softcap=softcap, implementation="splash")
    texts = jax.tree.map(lambda x: x[:, :columns], texts)
    exported = jax.export.export(jax.jit(call), platforms=["tpu"])(*texts)
    assert "tpu_custom_call" in exported.mlir_module()


def test_splash_multiplies_bfloat16_as_it_is_whatever_the_precision_of_products(texts):
    """Recipes ask for float32 products, which the TPU's compiler of kernels has for float32 alone."""
    *arrays, mask = texts
    arrays = [x.astype(jnp.bfloat16) for x in arrays]

    def total(attention, *inputs):
        out = attention(*inputs, mask, 0.3, None, None)
        return jnp.where(mask.segments[..., None, None] > 0, jnp.sin(out.astype(jnp.float32)), 0.0).sum()

    def slopes(attention):
        return jax.grad(partial(total, attention), argnums=(0, 1, 2))

    splash = partial(splash_attention, interpret=True)
    with jax.default_matmul_precision("float32"):
        text = str(jax.make_jaxpr(slopes(splash))(*arrays))
    assert text.count("dot_general") >= 5  # scores and values, and three of the backward pass
    assert "HIGHEST" not in text
    got, want = slopes(splash)(*arrays), slopes(partial(attend, implementation="xla"))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=0.15), *jax.tree.map(np.float32, (got, want)))


def test_a_window_counts_the_query_itself():
    mask = AttentionMask(jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32))
    np.testing.assert_array_equal(mask.visible(2)[0][0], np.tri(4) - np.tri(4, k=-2))
    np.testing.assert_array_equal(mask.visible(1)[0][0], np.eye(4))


def test_padding_sees_nothing_and_gives_numbers(texts):
    query, key, value, mask = texts
    visible = np.asarray(mask.visible()[0])
    assert not visible[0, 91:].any()
    assert not visible[0, :, 91:].any()
    assert np.isfinite(attend(query, key, value, mask, 0.3, implementation="xla")).all()


@pytest.mark.parametrize(
    ("kernel", "can_cut", "changes", "chosen"),
    [
        ("cudnn", False, {}, "cudnn"),
        ("cudnn", True, {"dtype": jnp.float16}, "cudnn"),
        ("cudnn", True, {"dtype": jnp.float32}, "xla"),
        ("cudnn", True, {"softcap": 50.0}, "xla"),
        ("cudnn", True, {"head_dim": 256}, "xla"),
        ("cudnn", True, {"head_dim": 60}, "xla"),
        ("splash", True, {}, "splash"),
        ("splash", True, {"dtype": jnp.float32, "softcap": 50.0, "head_dim": 60}, "splash"),
        ("splash", False, {}, "xla"),
        ("xla", True, {}, "xla"),
    ],
)
def test_the_implementation_that_auto_is(kernel, can_cut, changes, chosen):
    asked = {"head_dim": 64, "dtype": jnp.bfloat16, "softcap": None} | changes
    assert choose_implementation(kernel, can_cut, **asked) == chosen


@pytest.mark.parametrize(
    ("platform", "capability", "kernel"),
    [
        ("gpu", "9.0", "cudnn"),
        ("gpu", "8.0", "cudnn"),
        ("gpu", "10.3", "cudnn"),
        ("gpu", "7.5", "xla"),  # T4: bfloat16 there must not raise
        ("gpu", "gfx942", "xla"),  # AMD
        ("tpu", None, "splash"),
        ("cpu", None, "xla"),
    ],
)
def test_the_flash_attention_of_a_device(platform, capability, kernel):
    of_gpu = {"compute_capability": capability} if platform == "gpu" else {}
    assert flash_kernel(SimpleNamespace(platform=platform, **of_gpu)) == kernel


@pytest.mark.parametrize(
    ("columns", "keys", "window", "softcap"),
    [(128, 256, 17, 2.0), (100, 150, None, None), (3, 130, 5, None)],
)
def test_splash_is_dense_for_the_last_columns_of_longer_keys(columns, keys, window, softcap):
    """As rows attend to a shared prefix: the queries are the last columns, the first 30 keys are padding.

    The kernel takes multiples of 128 columns; others are padded, and what is added gets no gradient.
    """
    draw = np.random.RandomState(0)
    query, key, value = (jnp.float32(draw.standard_normal((1, keys, heads, 24))) for heads in (4, 2, 2))
    segments = jnp.asarray(np.arange(keys) >= 30, jnp.int32)[None]
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    mask = AttentionMask(positions[:, -columns:], segments[:, -columns:], ((positions, segments),))
    real = (mask.segments > 0)[:, :, None, None]

    def total(call, *inputs):
        out = jnp.where(real, call(*inputs, mask, 0.3, window, softcap), 0.0)
        return (out**2).sum(), out

    inputs = (query[:, -columns:], key, value)
    gradient = partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)
    dense, splash = partial(attend, implementation="xla"), partial(splash_attention, interpret=True)
    (_, want), want_slopes = jax.jit(partial(gradient(total), dense))(*inputs)
    (_, got), got_slopes = jax.jit(partial(gradient(total), splash))(*inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    for got, want in zip(got_slopes, want_slopes, strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("sizes", "rows", "kv_heads", "divides"),
    [
        ({"fsdp": 4, "tensor": 2}, 8, 2, True),
        ({"fsdp": 4, "tensor": 2}, 6, 2, False),
        ({"fsdp": 2, "tensor": 4}, 8, 2, False),
        ({"fsdp": 2, "expert": 4}, 8, 1, True),
        ({"fsdp": 2, "expert": 4}, 4, 1, False),
        ({"fsdp": 4, "sequence": 2}, 8, 2, False),
    ],
)
def test_which_meshes_cut_rows_and_heads(sizes, rows, kv_heads, divides):
    assert divides_over(hidden_sharding(make_mesh(**sizes)), rows, kv_heads) == divides


def four_rows(texts):
    """The text as four rows whose numbers differ."""
    query, key, value, mask = texts
    scales = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1) / 4
    rows = AttentionMask(*(jnp.repeat(x, 4, axis=0) for x in mask[:2]))
    return query * scales, key * scales, value * scales, rows


@pytest.mark.parametrize(("window", "softcap"), [(None, None), pytest.param(17, 2.0, marks=pytest.mark.nightly)])
def test_splash_on_a_mesh_is_dense_and_so_is_its_gradient(texts, window, softcap):
    """Two devices for the heads, two copies of two for the rows."""
    query, key, value, mask = four_rows(texts)
    sharding = hidden_sharding(make_mesh(2, 2, 2))
    real = (mask.segments > 0)[:, :, None, None]
    weights = jnp.cos(jnp.arange(query.size)).reshape(query.shape) * real

    def total(call, *inputs):
        out = call(*inputs, mask, 0.3, window, softcap)
        return (weights * out).sum(), jnp.where(real, out, 0.0)

    splash = partial(splash_attention, sharding=sharding, interpret=True)
    gradient = partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)
    (_, got), got_slopes = jax.jit(partial(gradient(total), splash))(query, key, value)
    dense = partial(attend, implementation="xla")
    (_, want), want_slopes = jax.jit(partial(gradient(total), dense))(query, key, value)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    for got, want in zip(got_slopes, want_slopes, strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_splash_on_a_mesh_compiles_for_a_tpu_and_collects_nothing(texts):
    sharding = hidden_sharding(make_mesh(2, 2, 2))
    call = partial(attend, scale=0.3, implementation="splash", sharding=sharding)
    exported = jax.export.export(jax.jit(call), platforms=["tpu"])(*four_rows(texts))
    module = exported.mlir_module()
    assert "tpu_custom_call" in module
    assert "all_gather" not in module
