"""Every implementation of attention against the plain one, and which of them is taken where."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import AttentionMask, attend, choose_implementation, splash_attention

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


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (17, 2.0)])
def test_splash_compiles_for_a_tpu(texts, window, softcap):
    call = partial(attend, scale=0.3, window=window, softcap=softcap, implementation="splash")
    exported = jax.export.export(jax.jit(call), platforms=["tpu"])(*texts)
    assert "tpu_custom_call" in exported.mlir_module()


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
    ("backend", "devices", "changes", "chosen"),
    [
        ("gpu", 8, {}, "cudnn"),
        ("gpu", 1, {"dtype": jnp.float16}, "cudnn"),
        ("gpu", 1, {"dtype": jnp.float32}, "xla"),
        ("gpu", 1, {"softcap": 50.0}, "xla"),
        ("gpu", 1, {"head_dim": 256}, "xla"),
        ("gpu", 1, {"head_dim": 60}, "xla"),
        ("tpu", 1, {}, "splash"),
        ("tpu", 1, {"dtype": jnp.float32, "softcap": 50.0, "head_dim": 60}, "splash"),
        ("tpu", 1, {"columns": 250}, "xla"),
        ("tpu", 1, {"keys": 300}, "xla"),
        ("tpu", 8, {}, "xla"),
        ("cpu", 8, {}, "xla"),
    ],
)
def test_the_implementation_that_auto_is(backend, devices, changes, chosen):
    dtype, softcap = changes.get("dtype", jnp.bfloat16), changes.get("softcap")
    shape = (2, changes.get("columns", 256), 4, changes.get("head_dim", 64))
    assert choose_implementation(backend, devices, shape, changes.get("keys", 256), dtype, softcap) == chosen


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (17, 2.0)])
def test_splash_is_dense_for_the_last_columns_of_longer_keys(window, softcap):
    """As rows attend to a shared prefix: the queries are the last 128 of 256 columns, the first 30 are padding."""
    draw = np.random.RandomState(0)
    query, key, value = (jnp.float32(draw.standard_normal((1, 2 * T, heads, 24))) for heads in (4, 2, 2))
    segments = jnp.asarray(np.arange(2 * T) >= 30, jnp.int32)[None]
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    mask = AttentionMask(positions[:, T:], segments[:, T:], ((positions, segments),))
    want = attend(query[:, T:], key, value, mask, 0.3, window, softcap, "xla")
    got = splash_attention(query[:, T:], key, value, mask, 0.3, window, softcap, interpret=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
