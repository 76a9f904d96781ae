"""Low-rank adapters: a second small pytree beside the decoder's parameters.

    LoRA     y = x W + s x A B,  s = α/r                  arXiv:2106.09685
    rsLoRA   s = α/√r                                     arXiv:2312.03732
    DoRA     y = (m / ‖W + s A B‖) ⊙ (x W + s x A B)      arXiv:2402.09353; norms over the input, without gradient

The tree mirrors the decoder's: where the weight stands there, here stand `down` (A), `up` (B) and for DoRA `magnitude`
(m). Training and sampling go the narrow way: of the product A B only DoRA's norms are taken. The policy without its
adapter is the reference, which therefore needs no copy.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from rljax.models import parts
from rljax.types import Params

INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}  # leading axes that are input


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how much."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's weight is alpha/rank
    targets: tuple[str, ...] = ("attention/", "mlp/")  # patterns, searched in paths such as layers/3/attention/query
    use_rslora: bool = False  # alpha/√rank
    decomposed: bool = False  # DoRA

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@struct.dataclass
class Adapted:
    """A weight with its adapter, where a decoder expects a weight."""

    weight: jax.Array  # [in.. out..]
    down: jax.Array  # [in.. r]
    up: jax.Array  # [r out..]
    gain: jax.Array | None  # [out..] DoRA's m / ‖W + s A B‖
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self):
        return self.weight.shape

    def apply(self, x, inputs: int):
        """[N in] -> [N out], in x's dtype."""
        wide, rank = math.prod(self.shape[:inputs]), self.up.shape[0]
        weight, down, up = (
            w.astype(x.dtype).reshape(rows, -1) for w, rows in ((self.weight, wide), (self.down, wide), (self.up, rank))
        )
        out = x @ weight + self.scale * ((x @ down) @ up)
        return out if self.gain is None else (out * self.gain.reshape(1, -1)).astype(x.dtype)


def attach(lora: Lora, decoder: Params, adapter: Params) -> Params:
    """The decoder's parameters with `Adapted` weights, for `decoder.forward`."""

    def one(weight, inputs, down, up, magnitude=None):
        gain = None
        if magnitude is not None:
            gain = magnitude / jax.lax.stop_gradient(_norms(_sum(weight, down, up, lora.scale), inputs))
        return Adapted(weight, down, up, gain, lora.scale)

    return _replaced(decoder, adapter, one)


def merge(lora: Lora, decoder: Params, adapter: Params) -> Params:
    """The parameters that do without the adapter: W + s A B, with DoRA m (W + s A B)/‖W + s A B‖."""

    def one(weight, inputs, down, up, magnitude=None):
        out = _sum(weight, down, up, lora.scale)
        if magnitude is not None:
            out = out * (magnitude / _norms(out, inputs)).reshape((1,) * inputs + magnitude.shape)
        return out.astype(weight.dtype)

    return _replaced(decoder, adapter, one)


def unmerge(lora: Lora, merged: Params, adapter: Params) -> Params:
    """The base again, but for rounding. Raises ValueError for DoRA: which length W + s A B had is not in the result."""
    if lora.decomposed:
        raise ValueError("a merged DoRA adapter cannot be taken out again: keep the base")
    return merge(dataclasses.replace(lora, alpha=-lora.alpha), merged, adapter)


def _sum(weight, down, up, scale: float):
    """W + s A B in float32."""
    rank = up.shape[0]
    product = down.astype(jnp.float32).reshape(-1, rank) @ up.astype(jnp.float32).reshape(rank, -1)
    return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)


def _norms(weight, inputs: int):
    """Of each output's column, in float32."""
    return jnp.sqrt((weight.astype(jnp.float32) ** 2).sum(axis=tuple(range(inputs))))


def _replaced(decoder: Params, adapter: Params, one) -> Params:
    """The decoder with one(weight, inputs, down=.., up=.., ..) where it is adapted."""
    weights = flatten_dict(decoder)
    for path, leaf in flatten_dict(adapter, is_leaf=lambda _, x: not isinstance(x.get("up", {}), dict)).items():
        weights[path] = one(weights[path], INPUTS[path[-1]], **leaf)
    return unflatten_dict(weights)


# ------------------------------------------------------------------------------------------------------- making them


def adaptable(decoder: Params) -> dict[str, tuple]:
    """layers/3/attention/query and the like -> path, of every weight that may be adapted: no router, no expert."""
    axes = {"attention": 3, "mlp": 2}
    paths = {tuple(key.key for key in path): leaf.ndim for path, leaf in jax.tree.leaves_with_path(decoder)}
    able = (path for path, ndim in paths.items() if path[-1] in INPUTS and ndim == axes[path[-2]])
    return {"/".join(map(str, path)): path for path in able}


def targets(lora: Lora, decoder: Params) -> list[tuple]:
    """Paths of the weights that are adapted. Raises ValueError where a pattern finds none."""
    able = adaptable(decoder)
    chosen = parts.matching(able, lora.targets)
    return [path for name, path in able.items() if name in chosen]


def init(lora: Lora, decoder: Params, key) -> Params:
    """A uniform in ±1/√in, B zero, m the norms of W: at first an adapter changes nothing."""
    weights, tree = flatten_dict(decoder), {}
    for i, path in enumerate(targets(lora, decoder)):
        weight, inputs = weights[path], INPUTS[path[-1]]
        inner, outer = weight.shape[:inputs], weight.shape[inputs:]
        bound = math.prod(inner) ** -0.5
        down = jax.random.uniform(jax.random.fold_in(key, i), (*inner, lora.rank), minval=-bound, maxval=bound)
        leaf = {"down": down, "up": jnp.zeros((lora.rank, *outer))}
        tree[path] = leaf | ({"magnitude": _norms(weight, inputs)} if lora.decomposed else {})
    return unflatten_dict(tree)


def logical_axes(lora: Lora, decoder_axes: Params, shapes: Params) -> Params:
    """Logical axis names of each of `init`'s arrays: those of the weights, none along the rank."""
    weights, tree = flatten_dict(decoder_axes), {}
    for path in targets(lora, shapes):
        names, inputs = weights[path], INPUTS[path[-1]]
        leaf = {"down": (*names[:inputs], None), "up": (None, *names[inputs:])}
        tree[path] = leaf | ({"magnitude": names[inputs:]} if lora.decomposed else {})
    return unflatten_dict(tree)
