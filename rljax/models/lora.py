"""Low-rank adapters: a second small pytree beside the decoder's parameters.

    LoRA     y = x W + s x A B,  s = α/r                  arXiv:2106.09685
    rsLoRA   s = α/√r                                     arXiv:2312.03732
    DoRA     y = (m / ‖W + s A B‖) ⊙ (x W + s x A B)      arXiv:2402.09353; norms over the input, without gradient

The tree mirrors the decoder's: where the weight stands there, here stand `down` (A), `up` (B) and for DoRA `magnitude`
(m). The product A B is made by `merge` only; training and sampling go the narrow way. The policy without its adapter is
the reference, which therefore needs no copy.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from flax import struct

from rljax.types import Params

INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}  # leading axes that are input


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how much."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's weight is alpha/rank
    targets: tuple[str, ...] = ("attention/", "mlp/")  # patterns, searched in paths such as layers/3/attention/query
    rank_stabilised: bool = False  # alpha/√rank
    decomposed: bool = False  # DoRA

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@struct.dataclass
class Adapted:
    """A weight with its adapter, where a decoder expects a weight."""

    weight: jax.Array  # [in.. out..]
    down: jax.Array  # [in.. r]
    up: jax.Array  # [r out..]
    magnitude: jax.Array | None  # [out..]
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self):
        return self.weight.shape

    def apply(self, x, inputs: int):
        """[N in] -> [N out]."""
        cast = lambda w, rows: w.astype(x.dtype).reshape(rows, -1)  # noqa: E731
        rank, wide = self.up.shape[0], math.prod(self.shape[:inputs])
        out = x @ cast(self.weight, wide) + self.scale * ((x @ cast(self.down, wide)) @ cast(self.up, rank))
        if self.magnitude is None:
            return out
        norm = jax.lax.stop_gradient(_norms(_sum(self.weight, self.down, self.up, self.scale, inputs), inputs))
        return out * (self.magnitude / norm).astype(x.dtype).reshape(1, -1)


def _sum(weight, down, up, scale: float, inputs: int):
    """W + s A B in float32."""
    product = down.astype(jnp.float32).reshape(-1, up.shape[0]) @ up.astype(jnp.float32).reshape(up.shape[0], -1)
    return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)


def _norms(weight, inputs: int):
    """Of each output's column."""
    return jnp.sqrt((weight.astype(jnp.float32) ** 2).sum(axis=tuple(range(inputs))))


# --------------------------------------------------------------------------------------------------------------- trees


def targets(lora: Lora, shapes: Params) -> list[tuple]:
    """Paths of the weights that are adapted. Raises ValueError where a pattern finds none."""
    paths = [tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    able = [p for p in paths if p[-1] in INPUTS and len(_at(shapes, p).shape) == _axes(p)]
    found = {pattern: [p for p in able if re.search(pattern, "/".join(map(str, p)))] for pattern in lora.targets}
    if barren := [pattern for pattern, hits in found.items() if not hits]:
        raise ValueError(f"no weight to adapt matches {barren}; there are {sorted({'/'.join(p[2:]) for p in able})}")
    return [p for p in able if any(p in hits for hits in found.values())]


def _axes(path: tuple) -> int:
    return 3 if path[-2] == "attention" else 2


def init(lora: Lora, decoder: Params, key) -> Params:
    """A uniform in ±1/√in, B zero, m the norms of W: at first an adapter changes nothing."""
    tree = {}
    for i, path in enumerate(targets(lora, decoder)):
        weight, inputs = _at(decoder, path), INPUTS[path[-1]]
        inner, outer = weight.shape[:inputs], weight.shape[inputs:]
        bound = math.prod(inner) ** -0.5
        down = jax.random.uniform(jax.random.fold_in(key, i), (*inner, lora.rank), minval=-bound, maxval=bound)
        leaf = {"down": down, "up": jnp.zeros((lora.rank, *outer))}
        _put(tree, path, leaf | ({"magnitude": _norms(weight, inputs)} if lora.decomposed else {}))
    return tree


def logical_axes(lora: Lora, decoder_axes: Params, shapes: Params) -> Params:
    """Logical axis names of each of `init`'s arrays: those of the weights, none along the rank."""
    tree = {}
    for path in targets(lora, shapes):
        names, inputs = _at(decoder_axes, path), INPUTS[path[-1]]
        leaf = {"down": (*names[:inputs], None), "up": (None, *names[inputs:])}
        _put(tree, path, leaf | ({"magnitude": names[inputs:]} if lora.decomposed else {}))
    return tree


def attach(lora: Lora, decoder: Params, adapter: Params) -> Params:
    """The decoder's parameters with `Adapted` weights, for `decoder.forward`."""

    def one(path, leaf):
        weight = _at(decoder, path)
        return Adapted(weight, leaf["down"], leaf["up"], leaf.get("magnitude"), lora.scale)

    return _replaced(decoder, adapter, one)


def merge(lora: Lora, decoder: Params, adapter: Params) -> Params:
    """The parameters that do without the adapter: W + s A B, with DoRA m (W + s A B)/‖W + s A B‖."""

    def one(path, leaf):
        weight, inputs = _at(decoder, path), INPUTS[path[-1]]
        out = _sum(weight, leaf["down"], leaf["up"], lora.scale, inputs)
        if "magnitude" in leaf:
            out = out * (leaf["magnitude"] / _norms(out, inputs)).reshape((1,) * inputs + weight.shape[inputs:])
        return out.astype(weight.dtype)

    return _replaced(decoder, adapter, one)


def unmerge(lora: Lora, merged: Params, adapter: Params) -> Params:
    """The base again, but for rounding. Raises ValueError for DoRA: which length W + s A B had is not in the result."""
    if lora.decomposed:
        raise ValueError("a merged DoRA adapter cannot be taken out again: keep the base")
    opposite = dataclasses.replace(lora, alpha=-lora.alpha)
    return merge(opposite, merged, adapter)


def _replaced(tree: Params, adapter: Params, one, path: tuple = ()) -> Params:
    """The tree with one(path, leaf) wherever the adapter has a leaf {"down", "up", …}."""
    if "up" in adapter and not isinstance(adapter["up"], dict):
        return one(path, adapter)
    return tree | {name: _replaced(tree[name], inner, one, (*path, name)) for name, inner in adapter.items()}


def _at(tree: Params, path: tuple):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict, path: tuple, leaf) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
