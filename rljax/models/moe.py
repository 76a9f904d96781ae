"""Mixtures of experts: each token goes through the few MLPs its router gives the most weight (Qwen3-MoE's form)."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Experts:
    """Which layers are mixtures, and of what."""

    count: int  # experts in a layer
    chosen: int  # experts that a token goes through
    width: int  # of each
    layers: tuple[int, ...]  # that are mixtures; the others have the one MLP
    normalised: bool  # the weights of the chosen sum to 1

    @property
    def dtype(self):
        """Of the numbers of experts in a record of choices."""
        return jnp.uint8 if self.count <= 256 else jnp.uint16


def route(logits, experts: Experts, replayed=None):
    """Which experts [N k], and their weights [N k]: softmax over all in float32, then the k largest.

    `replayed` [N k]: the choice made while sampling. The weights are still the router's, and so are the gradients.
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jax.lax.top_k(shares, experts.chosen)[1] if replayed is None else replayed.astype(jnp.int32)
    weights = jnp.take_along_axis(shares, chosen, axis=-1)
    if experts.normalised:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def mix(x, chosen, weights, gate, up, down, activation):
    """Σ_k weight_k · MLP of expert chosen_k, for x [N D]. gate, up: [E D F]; down: [E F D].

    Tokens are sorted by expert, so that each expert's are one block of a grouped matmul: no token is dropped, and no
    expert computes what it was not given.
    """
    N, k = chosen.shape
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0])
    rows = x[order // k]
    between = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(between, down, sizes)
    out = jnp.zeros_like(out).at[order].set(out).reshape(N, k, -1)
    return (out * weights[..., None].astype(out.dtype)).sum(axis=1)
