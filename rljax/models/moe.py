"""Mixture of experts (MoE): a router sends each token through a few of a layer's MLPs (Qwen3-MoE's form)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    """Σ_k weight_k · MLP of expert chosen_k.

    Tokens are sorted by expert, so that the tokens of an expert are one block of a grouped matmul. No token is dropped,
    and each expert computes only the tokens routed to it.
    """
    N, k = chosen.shape
    order = jnp.argsort(chosen.reshape(-1))
    group_sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0])
    sorted_x = x[order // k]
    gated = activation(jax.lax.ragged_dot(sorted_x, gate, group_sizes))
    inner = gated * jax.lax.ragged_dot(sorted_x, up, group_sizes)
    sorted_out = jax.lax.ragged_dot(inner, down, group_sizes)
    out = jnp.zeros_like(sorted_out).at[order].set(sorted_out).reshape(N, k, -1)
    return (out * weights[..., None].astype(out.dtype)).sum(axis=1)
