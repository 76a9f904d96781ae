"""What the programs of a step of grpo.py hold on a device, by formulas.

Sizes of arguments, results and caches are those of their shardings, exact. The largest of the temporaries are told by
name; how many copies of each a compiler makes is taken from what it was seen to make (docs/preflight.md).
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import activations
from experiments.common.activations import SINGLE
from experiments.common.costs import Sizes, num_layer_params
from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.policy import default_chunk_tokens
from rljax.train.mesh import HOST_MEMORY, data_parallel_size, sharding_of


def device_bytes(tree: Any, on_host: bool = False) -> int:
    """Bytes on one device of a tree of shapes with shardings.

    on_host: of the arrays that wait in the host's memory, in place of those that stay on the device.
    """

    def of_leaf(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        item = 4 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        words = 2 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else 1
        return math.prod(shape) * item * words

    def waits(x) -> bool:
        return x.sharding is not None and x.sharding.memory_kind == HOST_MEMORY

    return sum(of_leaf(x) for x in jax.tree.leaves(tree) if hasattr(x, "shape") and waits(x) == on_host)


def cache_bytes(config: DecoderConfig, mesh: jax.sharding.Mesh, sizes: Sizes) -> int:
    """Keys and values on one device: of the prompts, once for each group, and of all completions."""
    of_token = 2 * config.head_dim * np.dtype(config.dtype).itemsize * config.num_layers

    def on_device(rows: int, columns: int) -> int:
        sharding = sharding_of(mesh, ("rollout_rows", "kv_heads"), (rows, config.num_kv_heads))
        return math.prod(sharding.shard_shape((rows, config.num_kv_heads))) * columns * of_token

    return on_device(sizes.prompts, sizes.prompt_tokens) + on_device(sizes.rows, sizes.max_tokens)


def gathered_bytes(config: DecoderConfig, mesh: jax.sharding.Mesh) -> int:
    """The copy of the layers' weights on one device that the sampler makes with `gather_for_generation`."""
    item = np.dtype(config.dtype).itemsize

    def of_weight(names: tuple, weight: jax.ShapeDtypeStruct) -> int:
        if "embed" not in names:
            return 0
        kept = tuple(None if name == "embed" else name for name in names)
        return math.prod(sharding_of(mesh, kept, weight.shape).shard_shape(weight.shape)) * item

    axes, shapes = decoder.param_axes(config), decoder.abstract(config)
    return sum(jax.tree.leaves(jax.tree.map(of_weight, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))))


def decoding_terms(config: DecoderConfig, mesh: jax.sharding.Mesh, sizes: Sizes, backend: str) -> dict[str, float]:
    """About the bytes that a rollout holds on one device besides its arguments and results, by array.

    While it grows, the cache exists twice. The TPU compiler keeps room for the weights of a layer beside it; XLA for
    CPUs copies keys and values one after the other, before it gathers weights (both as measured: docs/preflight.md).
    """
    cache = cache_bytes(config, mesh, sizes)
    if config.gather_for_generation:
        weights = {"gathered weights": gathered_bytes(config, mesh)}
    else:
        of_layer = num_layer_params(config) / config.num_layers / mesh.shape["tensor"]
        weights = {"weights of a layer": SINGLE * of_layer * layers_at_once(config)}
    logits = {"logits": 3 * sizes.rows / mesh.size * config.vocab_size * SINGLE}
    if backend != "cpu":
        return {"KV cache": 2 * cache} | weights | logits
    if config.gather_for_generation or cache / 2 < sum(weights.values()):
        return {"KV cache": cache} | weights | logits
    return {"KV cache": 1.5 * cache} | logits


def layers_at_once(config: DecoderConfig) -> int:
    """Layers whose weights are gathered together: those of the body of a scan (a period of Gemma's has six)."""
    return max(len(body) for body in config.layer_scans()) if config.scan_layers else 1


class _MicroBatch(NamedTuple):
    """What is computed at a time."""

    all_rows: int
    rows: float  # on one device
    columns: float  # of completions, on one device
    tokens: float  # on one device, prompts included


def activation_terms(
    config: DecoderConfig, mesh: jax.sharding.Mesh, sizes: Sizes, trained: float, backend: str
) -> dict[str, float]:
    """The same of a pass over a micro-batch, besides its arguments and results.

    trained: bytes on a device of the float32 parameters that it is differentiated by; 0: a pass without a gradient.

    Attention, the MLP and the logits are computed one after the other: without a gradient the largest of the three is
    counted. The backward pass of a layer holds all that the layer computes: with one, the layer or the logits. What the
    other layers keep for it stays too (`activations.of_update`).
    """
    all_rows = sizes.rows * sizes.epochs // (sizes.updates * sizes.pieces.micro_batches)
    rows = max(1.0, all_rows / data_parallel_size(mesh))
    columns = sizes.max_tokens / mesh.shape["sequence"]
    tokens = rows * (columns + sizes.prompt_tokens / sizes.pieces.group_size / mesh.shape["sequence"])
    piece = _MicroBatch(all_rows, rows, columns, tokens)
    has_gradient = trained > 0
    keys = sizes.prompt_tokens + sizes.max_tokens
    dense = activations.is_dense(config, mesh, activations.KERNELS.get(backend, "xla"))
    grouped = backend in activations.GROUPED
    of_attention, of_mlp = _layer_weights(config, mesh, has_gradient)
    logits = _logits_terms(config, mesh, piece, has_gradient, backend)
    if not has_gradient:
        one = activations.of_token(config, mesh, keys, dense, grouped, has_gradient)
        attention = {"one layer": tokens * one.attention, "weights of a layer": of_attention}
        if dense:
            attention["attention scores"] = 2 * rows * columns * one.scores  # and probabilities
        mlp = {"one layer": tokens * one.mlp, "weights of a layer": of_mlp}
        return max(attention, mlp, logits, key=_total)

    layer = activations.of_update(config, mesh, tokens, rows * columns, keys, dense, grouped)
    kept = layer.pop("kept activations")
    layer["weights of a layer"] = of_attention + of_mlp
    copies = 1 if sizes.pieces.micro_batches == 1 else 2  # the sum, and what a micro-batch adds to it
    return max(layer, logits, key=_total) | {"kept activations": kept, "gradients": copies * trained}


def _total(arrays: dict[str, float]) -> float:
    return sum(arrays.values())


def _layer_weights(config: DecoderConfig, mesh: jax.sharding.Mesh, has_gradient: bool) -> tuple[float, float]:
    """Bytes of the weights of attention, and of those of the MLP or the experts, as a device computes with them."""
    projected = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    others = (num_layer_params(config) / config.num_layers - projected) / mesh.shape["expert"]
    return tuple(_weights_as_computed(config, mesh, weights, has_gradient) for weights in (projected, others))


def _weights_as_computed(config: DecoderConfig, mesh: jax.sharding.Mesh, weights: float, has_gradient: bool) -> float:
    """Bytes of weights that are gathered, and of their gradient before it is scattered."""
    of_weight = np.dtype(config.dtype).itemsize + SINGLE * has_gradient
    return layers_at_once(config) * weights / mesh.shape["tensor"] * of_weight


def _logits_terms(
    config: DecoderConfig, mesh: jax.sharding.Mesh, piece: _MicroBatch, has_gradient: bool, backend: str
) -> dict[str, float]:
    """Logits of a chunk of tokens, with what their log-probs need, and the table that they are products with.

    Where tokens are few their hidden states go to the parts of the table, and the logits come back (`models.layers`);
    else each device has all of the table, and of its gradient both the sum over chunks and a chunk's.
    """
    half = np.dtype(config.dtype).itemsize
    most = default_chunk_tokens(config.vocab_size, backend, mesh.size)
    chunk = max(piece.all_rows, min(piece.all_rows * piece.columns, most))
    hidden = chunk * config.hidden_size * half
    logits = chunk / mesh.size * config.vocab_size * SINGLE
    table = config.vocab_size * config.hidden_size
    moves = hidden + logits < table * half
    copies = 3 * (2 if moves else 1) * (2 if has_gradient else 1)
    of_entry = half + SINGLE * has_gradient * (1 if moves else 2)
    parts = mesh.shape["tensor"] * mesh.shape["fsdp"] if moves else 1
    return {"logits": copies * logits + moves * hidden, "table of logits": of_entry * table / parts}
