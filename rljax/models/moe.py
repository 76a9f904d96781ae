"""Mixture of experts (MoE): a router sends each token through a few of a layer's MLPs (Qwen3-MoE's form)."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from rljax.models.partition import num_shards


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which layers are mixtures of experts, and their sizes; the names are those of Hugging Face's config.json."""

    num_experts: int  # in a layer
    num_experts_per_tok: int  # experts that a token goes through
    intermediate_size: int  # of each expert
    layers: tuple[int, ...]  # indices of the layers that are mixtures; the others have one MLP
    norm_topk_prob: bool  # whether the weights of the chosen experts sum to 1

    @property
    def routing_dtype(self):
        """Dtype of recorded expert indices."""
        return jnp.uint8 if self.num_experts <= 256 else jnp.uint16


def route(
    logits: Float[Array, "N E"], config: MoEConfig, replayed: Int[Array, "N k"] | None = None
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """The chosen experts and their weights: softmax over all experts in float32, then the k largest.

    replayed: the experts chosen at sampling time. Their weights, and so the gradients, are still the router's.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jax.lax.top_k(probs, config.num_experts_per_tok)[1]
    if replayed is not None:
        chosen = replayed.astype(jnp.int32)
    weights = jnp.take_along_axis(probs, chosen, axis=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def moe_mlp(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
) -> Float[Array, "N D"]:
    """Σ_k weight_k · MLP of expert chosen_k; what is no expert from 0 to E - 1 adds nothing.

    Tokens are sorted by expert, so that the tokens of an expert are one block of a grouped matmul. No token is dropped.
    On TPUs each expert computes only the tokens routed to it. For CPUs jax 0.10.2 writes the product as a dense one of
    E masked copies of all N·k rows, and on NVIDIA's GPUs XLA does (marin-community/marin issue 7012, jaxlib 0.10.2):
    E times the arithmetic, in arrays [N·k, E·D]. Newer XLA has cuDNN's grouped product (openxla/xla pull request
    42313), not tried here.
    """
    N, k = chosen.shape
    E = len(gate)
    is_here = (chosen >= 0) & (chosen < E)
    position, sizes = positions_by_expert(jnp.where(is_here, chosen, E).reshape(-1), E + 1)
    order = jnp.zeros_like(position).at[position].set(jnp.arange(N * k), unique_indices=True)
    # The TPU's grouped matmul refuses half precision with the float32 precision that scripts ask of all products.
    precision = jax.lax.Precision.DEFAULT if x.dtype.itemsize < 4 else None
    product = partial(jax.lax.ragged_dot, group_sizes=sizes[:E], precision=precision)
    sorted_x = permute(x, order, position)
    inner = activation(product(sorted_x, gate)) * product(sorted_x, up)
    out = permute(product(inner, down), position, order).reshape(N, k, -1)
    out = jnp.where(is_here[..., None], out, 0.0)
    return (out * weights[..., None].astype(out.dtype)).sum(axis=1)


def positions_by_expert(expert: Int[Array, " M"], num_experts: int) -> tuple[Int[Array, " M"], Int[Array, " E"]]:
    """Where each one stands when all are sorted by expert, equals in their order; and how many each expert has.

    A counting sort: XLA's own takes most of a minute to compile for a TPU. It holds up to three int32 arrays [M E].
    """
    is_expert = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
    counts = jnp.cumsum(is_expert, axis=0)
    sizes = counts[-1]
    starts = jnp.cumsum(sizes) - sizes
    return (is_expert * (starts[None] + counts - 1)).sum(axis=1), sizes


@jax.custom_vjp
def permute(x: Float[Array, "N D"], order: Int[Array, " M"], inverse: Int[Array, " M"]) -> Float[Array, "M D"]:
    """Each row M/N times, in the order of a permutation of all M whose inverse is given.

    The gradient is that of the definition, by the inverse permutation in place of a scatter of rows, which is slow.
    """
    return x[order // (len(order) // len(x))]


def _permute_forward(x, order, inverse):
    return permute(x, order, inverse), (inverse, len(x))


def _permute_backward(saved, gradient):
    inverse, rows = saved
    return gradient[inverse].reshape(rows, -1, gradient.shape[-1]).sum(axis=1), None, None


permute.defvjp(_permute_forward, _permute_backward)


def sharded_moe_mlp(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: Callable[[Array], Array],
    sharding: NamedSharding | None = None,
) -> Float[Array, "B T D"]:
    """`moe_mlp`, on a mesh of each device's own tokens, with its experts over the axis `expert`, where they divide.

    The devices along that axis hold rows too. Each collects the tokens of all of them and computes what its own experts
    add; the sums of each token go back to where it came from. So no token is dropped, whatever the routers choose. XLA
    by itself sorts the tokens of all devices on every device.

    Args:
      sharding: of x on a mesh.
    """
    E = len(gate)
    if sharding is None:
        flat = (found.reshape(-1, found.shape[-1]) for found in (x, chosen, weights))
        return moe_mlp(*flat, gate, up, down, activation).reshape(x.shape)

    expert = "expert" if E % sharding.mesh.shape["expert"] == 0 else None
    tensor = "tensor" if gate.shape[-1] % sharding.mesh.shape["tensor"] == 0 else None
    B, T, _ = x.shape
    padding = [(0, -B % num_shards(sharding, 0)), (0, -T % num_shards(sharding, 1))]

    def pad(found, fill):
        return jnp.pad(found, [*padding, (0, 0)], constant_values=fill)

    tokens = jax.P(*sharding.spec[:2])
    inner, outer = jax.P(expert, None, tensor), jax.P(expert, tensor)
    of_device = jax.shard_map(
        partial(_own_experts, activation=activation, expert=expert, tensor=tensor),
        mesh=sharding.mesh,
        in_specs=(tokens, tokens, tokens, inner, inner, outer),
        out_specs=tokens,
    )
    return of_device(pad(x, 0), pad(chosen, E), pad(weights, 0), gate, up, down)[:B, :T]


def _own_experts(x, chosen, weights, gate, up, down, activation: Callable, expert: str | None, tensor: str | None):
    """On each device: its tokens' sums, of which its own experts have computed their part for all of the axis."""
    tokens, experts, token_weights = (found.reshape(-1, found.shape[-1]) for found in (x, chosen, weights))
    if expert is not None:
        gather = partial(jax.lax.all_gather, axis_name=expert, tiled=True)
        tokens, experts, token_weights = gather(tokens), gather(experts), gather(token_weights)
        experts = experts - jax.lax.axis_index(expert) * len(gate)
    out = moe_mlp(tokens, experts, token_weights, gate, up, down, activation)
    if tensor is not None:  # each device of that axis has a part of the experts' width
        out = jax.lax.psum(out, tensor)
    if expert is not None:
        out = jax.lax.psum_scatter(out, expert, tiled=True)
    return out.reshape(x.shape)
