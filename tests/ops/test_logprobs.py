"""Log-probs and entropies against a dense float64 log-softmax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops.logprobs import chosen_logp, chunked_logprobs, entropy, gaussian_logp, in_chunks
from tests.ops.golden import close, narrow

B, T, D, V = 3, 10, 4, 11
draw = np.random.default_rng(0)
HIDDEN, TABLE = draw.normal(size=(B, T, D)), 2 * draw.normal(size=(D, V))
ACTIONS, TEMPERATURE = draw.integers(V, size=(B, T)), draw.uniform(0.5, 2.0, size=(B, T))


def dense(logits, temperature):
    z = logits / temperature[..., None]
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def by_chunks(chunk_tokens):
    def run(hidden, table):
        return chunked_logprobs(lambda h: h @ table, hidden, jnp.asarray(ACTIONS), narrow(TEMPERATURE), chunk_tokens)

    return run


@pytest.mark.parametrize("chunk_tokens", [1, 6, 9, 12, 30, 4096])  # columns: 1, 2, 3 (10 do not divide), 4, all, all
def test_values_are_the_dense_ones_whatever_the_chunk(chunk_tokens):
    logp, h, collision = jax.jit(by_chunks(chunk_tokens))(narrow(HIDDEN), narrow(TABLE))
    want = dense(HIDDEN @ TABLE, TEMPERATURE)
    close(logp, np.take_along_axis(want, ACTIONS[..., None], -1)[..., 0])
    close(h, -(np.exp(want) * want).sum(-1))
    close(collision, np.exp(2 * want).sum(-1))


@pytest.mark.parametrize("chunk_tokens", [9, 4096])
def test_gradients_are_the_dense_ones_whatever_the_chunk(chunk_tokens):
    """∂ logp/∂z = onehot - p and ∂ H/∂z = -p (log p + H), over the temperature."""
    a, b = draw.normal(size=(2, B, T))
    run = by_chunks(chunk_tokens)

    def loss(hidden, table):
        logp, h, _ = run(hidden, table)
        return (narrow(a) * logp + narrow(b) * h).sum()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(narrow(HIDDEN), narrow(TABLE))
    logp = dense(HIDDEN @ TABLE, TEMPERATURE)
    p, h = np.exp(logp), -(np.exp(logp) * logp).sum(-1, keepdims=True)
    by_logits = (a[..., None] * (np.eye(V)[ACTIONS] - p) - b[..., None] * p * (logp + h)) / TEMPERATURE[..., None]
    close(slopes[0], by_logits @ TABLE.T, atol=1e-5)
    close(slopes[1], np.einsum("btd,btv->dv", HIDDEN, by_logits), atol=1e-5)


def test_no_array_of_the_size_of_all_logits_exists_in_value_or_gradient():
    run = by_chunks(6)
    program = jax.make_jaxpr(jax.grad(lambda h, w: sum(x.sum() for x in run(h, w)), argnums=(0, 1)))
    shapes = re.findall(r"\[([\d,]+)\]", str(program(narrow(HIDDEN), narrow(TABLE))))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    assert 2 * B * V <= max(sizes) < B * T * V


@pytest.mark.parametrize(("rows", "columns", "most", "width"), [(8, 129, 1024, 65), (2, 512, 883, 256), (3, 10, 9, 3)])
def test_chunks_are_as_even_as_they_can_be(rows, columns, most, width):
    shapes = set()

    def f(x):
        shapes.add(x.shape)
        return x

    jax.eval_shape(lambda x: in_chunks(f, most, x), jnp.zeros((rows, columns)))
    assert shapes == {(rows, width)}
    assert -(-columns // width) * width - columns < -(-columns // width)


def test_low_precision_logits_are_summed_in_float32():
    logits = narrow(np.full((1, 1000), 0.1)).astype(jnp.bfloat16)
    one = jnp.ones(1)
    close(chosen_logp(logits, jnp.zeros(1, int), one), [-np.log(1000)])
    close(entropy(logits, one), [np.log(1000)])


def test_gaussian_log_probs_are_numpys():
    rng = np.random.default_rng(0)
    mean, actions, std = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.uniform(0.5, 2.0, (2, 3))
    density = np.exp(-0.5 * ((actions - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    got = gaussian_logp(*(jnp.asarray(x, jnp.float32) for x in (mean, std, actions)))
    np.testing.assert_allclose(got, np.log(density).sum(axis=1), rtol=1e-5)
