"""What a decoder holds of each token on one device while it is scored or differentiated, by one formula.

`micro_batches.py` cuts an update by it, and `device_memory.py` plans one.
"""

from typing import NamedTuple

import jax
import numpy as np

from rljax.models.attention import choose_implementation
from rljax.models.decoder import DecoderConfig

SINGLE = 4  # bytes of a float32
KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # `flash_kernel` of the devices that plans are made for
GROUPED = ("tpu",)  # platforms on which an expert is multiplied by its own tokens alone (`models.moe.moe_mlp`)


class TokenBytes(NamedTuple):
    """Of one token on one device, in one layer."""

    inputs: float  # of the layer: the hidden state
    attention: float  # what its attention computes, but for scores: inputs and outputs of products
    mlp: float  # the same of its MLP or experts
    products: float  # those outputs of products that `remat="dots"` keeps
    scores: float  # with all keys, in float32, where they are an array; 0: a kernel computes them again


def is_dense(config: DecoderConfig, mesh: jax.sharding.Mesh, kernel: str) -> bool:
    """Whether the scores of a micro-batch are an array in an update on this mesh.

    kernel: the `flash_kernel` of its devices.
    """
    if config.batch_invariant or config.attn_implementation != "auto":
        return config.batch_invariant or config.attn_implementation == "xla"
    can_cut = mesh.shape["sequence"] == 1 and config.num_kv_heads % mesh.shape["tensor"] == 0
    dtype = np.dtype(config.dtype)
    return choose_implementation(kernel, can_cut, config.head_dim, dtype, config.attention_softcap) == "xla"


def of_token(
    config: DecoderConfig, mesh: jax.sharding.Mesh, keys: int, dense: bool, grouped: bool, has_gradient: bool = True
) -> TokenBytes:
    """Bytes of a token that attends to so many keys.

    Args:
      dense: as `is_dense` says.
      grouped: whether the devices' platform is one of GROUPED.
    """
    size = np.dtype(config.dtype).itemsize
    tensor = mesh.shape["tensor"]
    wide = config.hidden_size
    inner = config.intermediate_size / tensor
    heads, kv_heads = config.num_heads * config.head_dim / tensor, config.num_kv_heads * config.head_dim / tensor
    products = heads + 2 * kv_heads + wide
    if config.moe is None:
        mlp = 3 * inner
        products += 2 * inner + wide
    else:
        mlp = expert_numbers(config, mesh, grouped, has_gradient)
    return TokenBytes(
        inputs=size * wide,
        attention=size * (4 * wide + 2 * heads + 2 * kv_heads),
        mlp=size * mlp,
        products=size * products,
        scores=SINGLE * max(1, config.num_heads // tensor) * keys if dense else 0,
    )


def expert_shards(config: DecoderConfig, mesh: jax.sharding.Mesh) -> int:
    """Parts that the experts of a layer are split into over `expert`, where it divides them."""
    divides = config.moe is not None and config.moe.num_experts % mesh.shape["expert"] == 0
    return mesh.shape["expert"] if divides else 1


def expert_numbers(config: DecoderConfig, mesh: jax.sharding.Mesh, grouped: bool, has_gradient: bool) -> float:
    """Numbers that a layer of experts holds for each token of a device, which has the choices of all along `expert`.

    Forward these are its inputs beside gate and up, or its outputs twice: sorted by expert and in the order of tokens.
    Where products are not grouped, they are its inputs and a copy of them for each expert of the device. Of the
    backward pass as many as XLA for CPUs was seen to hold.
    """
    shards = expert_shards(config, mesh)
    rows = shards * config.moe.num_experts_per_tok
    wide, inner = config.hidden_size, config.moe.intermediate_size / mesh.shape["tensor"]
    if grouped:
        return rows * (4 * wide + 5.5 * inner if has_gradient else max(2 * wide, wide + 2 * inner))
    experts = config.moe.num_experts / shards
    return rows * (2 * wide + experts * (2 * wide + 6 * inner) if has_gradient else wide + experts * max(wide, inner))


def of_update(
    config: DecoderConfig, mesh: jax.sharding.Mesh, tokens: float, queries: float, keys: int, dense: bool, grouped: bool
) -> dict[str, float]:
    """Bytes of a micro-batch on one device while the backward pass is in a layer, by array.

    That is all of this layer: scores, probabilities and the gradient of one of these too, where they are arrays. Of
    the layers whose turn is still to come it is what `remat` keeps.

    Args:
      tokens: of the micro-batch on the device; `queries` of them, those of completions, attend to so many keys. (Those
        of prompts attend to prompts alone.)
    """
    one = of_token(config, mesh, keys, dense, grouped)
    layer = tokens * (one.attention + one.mlp)
    scores = queries * one.scores
    layers = config.num_layers
    kept = {
        "full": layers * tokens * one.inputs,
        "dots": layers * tokens * (one.inputs + one.products),
        "none": (layers - 1) * (layer + 2 * scores),
    }
    terms = {"one layer": layer, "kept activations": kept[config.remat]}
    return terms | {"attention scores": 3 * scores} if dense else terms
