r"""The seconds below which no rollout and no update comes on this machine: its roofline.

    python experiments/benchmarks/shares.py        # these, and the share of them that the code at hand reaches

Work is a list of passes: the prefill, each decode step, a forward pass, a backward pass, an optimizer step. A pass
takes the longer of two times: reading its bytes once, at the rate at which a working set of that size is read (caches
included), and its FLOPs, each product at the rate of its own shape. Both rates are measured inside one compiled loop,
so that no result is written to fresh memory.

A roofline has to be high enough:

* A product has the rate of the fastest of several ways to compute it: LAYOUTS of its operands, all of its rows at once
  or in pieces, and rows split over the devices where the work uses several.
* Projections of the same input count as one product (queries, keys and values; gate and up). The products of attention
  have the rate of the fastest other product of the pass.
* FLOPs are the useful ones: a prompt once for all its completions, the head only where a token is drawn or scored,
  attention only to keys that are visible, twice the forward pass for the backward pass, nothing computed again.
  Elementwise work, sampling and activations read or written count nothing.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.common import Workload, alternately
from rljax.models import decoder
from rljax.models.decoder import DecoderConfig

Shape = tuple[int, int, int]


class Matmul(NamedTuple):
    """[rows inner] x [inner columns], `count` times."""

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def shape(self) -> Shape:
        return self.rows, self.inner, self.columns

    @property
    def flops(self) -> int:
        return self.count * flops_of(self.shape)


class Work(NamedTuple):
    """One pass: its products with weights, the FLOPs of its attention, and the bytes that it reads."""

    matmuls: tuple[Matmul, ...]
    attention_flops: int
    bytes: int


class Rates(NamedTuple):
    """What a machine does in a second."""

    flops: dict[Shape, float]  # of a product of this shape
    reading: dict[int, float]  # bytes, of a working set of so many bytes


# -------------------------------------------------------------------------------------------------------- the seconds


def least_seconds(works: Iterable[Work], rates: Rates) -> float:
    """Of one pass after the other."""
    return sum(pass_seconds(work, rates) for work in works)


def pass_seconds(work: Work, rates: Rates) -> float:
    """The longer of reading the bytes and computing the products."""
    reading = work.bytes / rates.reading[working_set(work.bytes)]
    if not work.matmuls:
        return reading
    computing = sum(matmul.flops / rates.flops[matmul.shape] for matmul in work.matmuls)
    fastest = max(rates.flops[matmul.shape] for matmul in work.matmuls)
    return max(reading, computing + work.attention_flops / fastest)


def share(least: float, seconds: float) -> float:
    """The part of the roofline that a measured time reaches. Raises ValueError above 1: it is not high enough."""
    if least > seconds:
        raise ValueError(
            f"{seconds:.4g} s were measured and the roofline says at least {least:.4g} s: "
            "the ceiling was measured too low; measure again while nothing else runs on this machine"
        )
    return least / seconds


def flops_of(shape: Shape) -> int:
    return 2 * math.prod(shape)


def working_set(num_bytes: int) -> int:
    """The size whose reading rate stands for that of `num_bytes`: at most a fifth smaller, so never slower to read."""
    quantum = 2 ** max(0, num_bytes.bit_length() - 3)
    return num_bytes // quantum * quantum


# ----------------------------------------------------------------------------------------------------------- the works


def rollout_works(workload: Workload, config: DecoderConfig) -> list[Work]:
    """The prefill, which yields the first token, and a pass for each other token of the completions."""
    size = jnp.dtype(config.dtype).itemsize
    prompt_tokens = workload.prompts * workload.prompt_tokens
    weights = num_weights(config)
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # numbers in the cache for a token
    pairs = workload.prompts * causal_pairs(0, workload.prompt_tokens)
    prefill = (*trunk_matmuls(config, prompt_tokens), head_matmul(config, workload.prompts))
    works = [Work(prefill, attention_flops(config, pairs), size * weights)]
    step = (*trunk_matmuls(config, workload.rows), head_matmul(config, workload.rows))
    for t in range(1, workload.completion_tokens):
        filled = cached * (prompt_tokens + workload.rows * t)
        pairs = workload.rows * (workload.prompt_tokens + t)
        works.append(Work(step, attention_flops(config, pairs), size * (weights + filled)))
    return works


def update_works(workload: Workload, config: DecoderConfig) -> list[Work]:
    """A forward pass of prompts and completions, a backward pass, and a step of Adam.

    The last token of a completion is scored but read by no pass; the first token of all completions of a prompt is
    scored by one row of logits.
    """
    continued = workload.completion_tokens - 1
    tokens = workload.prompts * workload.prompt_tokens + workload.rows * continued
    scored = workload.prompts + workload.rows * continued
    pairs = workload.prompts * causal_pairs(0, workload.prompt_tokens)
    pairs += workload.rows * causal_pairs(workload.prompt_tokens, continued)
    forward = (*trunk_matmuls(config, tokens), head_matmul(config, scored))
    backward = tuple(gradient for matmul in forward for gradient in gradients_of(matmul))
    attention = attention_flops(config, pairs)
    read = jnp.dtype(config.dtype).itemsize * num_weights(config)
    adam = 7 * 4 * num_weights(config)  # reads parameter, gradient and two moments, writes all but the gradient
    return [Work(forward, attention, read), Work(backward, 2 * attention, read), Work((), 0, adam)]


def trunk_matmuls(config: DecoderConfig, rows: int) -> tuple[Matmul, ...]:
    """The products of all layers with the hidden states of so many tokens."""
    D, F, layers = config.hidden_size, config.intermediate_size, config.num_layers
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    return (
        Matmul(rows, D, queries + 2 * keys, layers),
        Matmul(rows, queries, D, layers),
        Matmul(rows, D, 2 * F, layers),
        Matmul(rows, F, D, layers),
    )


def head_matmul(config: DecoderConfig, rows: int) -> Matmul:
    return Matmul(rows, config.hidden_size, config.vocab_size)


def gradients_of(matmul: Matmul) -> tuple[Matmul, Matmul]:
    """The products that give the gradients of its left and of its right operand."""
    rows, inner, columns, count = matmul
    return Matmul(rows, columns, inner, count), Matmul(inner, rows, columns, count)


def attention_flops(config: DecoderConfig, pairs: int) -> int:
    """Of so many pairs of a query and a key that it sees: scores and weighted values of all heads and layers."""
    return 2 * 2 * config.num_layers * config.num_heads * config.head_dim * pairs


def causal_pairs(before: int, tokens: int) -> int:
    """Pairs of query and key in a row, where `tokens` queries see `before` keys and those up to their own."""
    return tokens * before + tokens * (tokens + 1) // 2


def num_weights(config: DecoderConfig) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(decoder.abstract(config)))


# ----------------------------------------------------------------------------------------------------------- the rates

LAYOUTS = ("mk,kn->mn", "mk,nk->mn", "nk,mk->nm")  # plain; the right operand transposed; with it as the left operand
LOOP_SECONDS = 0.02  # about as long as one timed loop takes ...
ASSUMED_FLOPS = {"cpu": 2e11, "gpu": 2e14, "tpu": 1e14}  # ... where the machine does so many a second,
ASSUMED_BYTES = {"cpu": 4e10, "gpu": 2e12, "tpu": 1e12}  # and reads so many
SMALL = 4e9  # FLOPs: larger products are measured in pieces only
TINY = 1e-30  # times this a result is fed back: XLA can neither move a product out of the loop nor leave it out


def measure(works: Iterable[Work], dtype: str, repeats: int, devices: int = 1, before: Rates | None = None) -> Rates:
    """The rates of all shapes and working sets of these works, each at its best, here or `before`.

    devices: that the work uses, of those of this machine; more would be a roofline that it cannot reach.
    """
    works = list(works)
    shapes = dict.fromkeys(matmul.shape for work in works for matmul in work.matmuls)
    sizes = dict.fromkeys(working_set(work.bytes) for work in works)
    flops = {shape: matmul_rate(shape, dtype, repeats, devices) for shape in shapes}
    reading = {size: read_rate(size, repeats, devices) for size in sizes}
    if before is None:
        return Rates(flops, reading)
    return Rates(_larger(flops, before.flops), _larger(reading, before.reading))


def _larger(rates: dict, others: dict) -> dict:
    return {key: max(rate, others[key]) for key, rate in rates.items()}


def matmul_rate(shape: Shape, dtype: str, repeats: int, devices: int) -> float:
    """FLOPs a second of a product of this shape: the best run of the fastest layout and size of pieces."""
    rates = []
    for piece in cut(shape):
        for layout in LAYOUTS:
            for used in {1, devices}:
                rates.append(_loop_rate(piece, layout, dtype, used, repeats))
    return max(rates)


def cut(shape: Shape) -> list[Shape]:
    """The shape itself unless it is large, and smaller ones: its longest axis but the last cut, and cut again."""
    rows, inner, columns = shape
    axis = 0 if rows >= inner else 1
    pieces = []
    for cuts in (1, 2, 4, 8, 16, 32, 64, 128):
        piece = [rows, inner, columns]
        piece[axis] = -(-piece[axis] // cuts)
        if cuts == 1 or (flops_of(piece) >= SMALL / 16 and piece[axis] >= 64):
            pieces.append(tuple(piece))
    fitting = [piece for piece in pieces if flops_of(piece) <= SMALL] or pieces[-1:]
    return list(dict.fromkeys([fitting[0], fitting[-1]]))


def _loop_rate(shape: Shape, layout: str, dtype: str, devices: int, repeats: int) -> float:
    if shape[0] % devices:
        return 0.0
    sizes = dict(zip("mkn", shape, strict=True))
    left, right, out = layout.replace("->", ",").split(",")
    shardings = _over_rows(devices)
    arrays = []
    for letters in (left, right, out):
        array = jnp.full([sizes[letter] for letter in letters], 0.01, dtype)
        arrays.append(jax.device_put(array, shardings[letters.find("m")]))
    count = max(1, int(LOOP_SECONDS * ASSUMED_FLOPS[jax.default_backend()] / flops_of(shape)))
    run = partial(_repeat_matmul, *arrays, layout, count)
    return count * flops_of(shape) / min(alternately({"": lambda _: run()}, repeats)[""])


def _over_rows(devices: int) -> dict[int, NamedSharding]:
    """By the axis of the rows, -1 where there is none: the sharding of an array whose rows are split over devices."""
    mesh = jax.make_mesh((devices,), ("rows",), devices=jax.devices()[:devices])
    specs = {-1: PartitionSpec(), 0: PartitionSpec("rows"), 1: PartitionSpec(None, "rows")}
    return {axis: NamedSharding(mesh, spec) for axis, spec in specs.items()}


@partial(jax.jit, static_argnums=(3, 4))
def _repeat_matmul(left, right, out, layout: str, count: int):
    """`count` products, each of operands that wait for the result before it."""
    columns_axis = layout.split("->")[1].find("n")

    def body(_, carry):
        left, right, _ = carry
        out = jnp.einsum(layout, left, right)
        fed_back = TINY * jax.lax.index_in_dim(out, 0, columns_axis, keepdims=False)
        if layout.startswith("mk"):
            left = left.at[:, 0].add(fed_back)
        else:
            right = right.at[:, 0].add(fed_back)
        return left, right, out

    return jax.lax.fori_loop(0, count, body, (left, right, out))[2]


READ_COLUMNS = 1024


def read_rate(num_bytes: int, repeats: int, devices: int) -> float:
    """Bytes a second of reading so many, again and again: the best run of products of matrices with a vector each.

    XLA's own reductions run on one thread of a CPU inside a loop; products of a matrix with a vector are spread.
    """
    return max(_reading_rate(num_bytes, used, n * used, repeats) for used in {1, devices} for n in (1, 2, 8))


def _reading_rate(num_bytes: int, devices: int, pieces: int, repeats: int) -> float:
    """With the bytes in so many pieces, of a row at least, spread over the devices."""
    rows = max(1, num_bytes // (4 * READ_COLUMNS * pieces))
    sharding = _over_rows(devices)[0]
    matrices = jax.device_put(jnp.ones((pieces, rows, READ_COLUMNS), jnp.float32), sharding)
    vectors = jax.device_put(jnp.ones((pieces, READ_COLUMNS), jnp.float32), sharding)
    count = max(1, int(LOOP_SECONDS * ASSUMED_BYTES[jax.default_backend()] / matrices.nbytes))
    run = partial(_repeat_reading, matrices, vectors, count)
    return count * matrices.nbytes / min(alternately({"": lambda _: run()}, repeats)[""])


@partial(jax.jit, static_argnums=2)
def _repeat_reading(matrices, vectors, count: int):
    def body(_, vectors):
        products = jnp.einsum("prc,pc->pr", matrices, vectors)
        return vectors + TINY * products.sum(axis=1, keepdims=True)

    return jax.lax.fori_loop(0, count, body, vectors)
