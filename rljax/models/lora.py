"""Low-rank adapters: a second small pytree beside the decoder's parameters.

    LoRA     y = x W + s x A B,  s = α/r                  arXiv:2106.09685
    rsLoRA   s = α/√r                                     arXiv:2312.03732
    DoRA     y = (m / ‖W + s A B‖) ⊙ (x W + s x A B)      arXiv:2402.09353; norms over the input, without gradient

The tree has the decoder's structure: in the place of a weight it has `down` (A), `up` (B) and for DoRA `magnitude` (m).
Training multiplies by A and B in turn, and so does sampling in bfloat16: the product A B is computed for DoRA's norms,
and where a rollout in float32 merges it into the weights. The reference is the policy without its adapter, so it needs
no copy.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from rljax.models import param_filters
from rljax.models.stacks import layers_of
from rljax.types import Params

# Number of leading axes of a weight that are its input.
INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights are adapted, and how; `use_rslora` and `use_dora` as in PEFT."""

    rank: int = 16
    alpha: float = 32.0  # the product A B is scaled by alpha/rank
    targets: tuple[str, ...] = ("attention/", "mlp/")  # patterns, searched in paths such as layers/3/attention/query
    use_rslora: bool = False  # scale by alpha/√rank
    use_dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@struct.dataclass
class LoraWeight:
    """A weight with its adapter, where a decoder expects a weight."""

    weight: jax.Array  # [in.. out..]
    down: jax.Array  # [in.. r]
    up: jax.Array  # [r out..]
    gain: jax.Array | None  # [out..] DoRA's m / ‖W + s A B‖
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def apply(self, x: Float[Array, "N in"], inputs: int, matmul: Callable = jnp.matmul) -> Float[Array, "N out"]:
        """x times the adapted weight, in x's dtype. `inputs`: how many leading axes of the weight are its input."""
        rows = math.prod(self.shape[:inputs])
        rank = self.up.shape[0]
        weight = self.weight.astype(x.dtype).reshape(rows, -1)
        down = self.down.astype(x.dtype).reshape(rows, -1)
        up = self.up.astype(x.dtype).reshape(rank, -1)
        out = matmul(x, weight) + self.scale * matmul(matmul(x, down), up)
        if self.gain is None:
            return out
        return (out * self.gain.reshape(1, -1)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------- applying an adapter


def attach(config: LoraConfig, decoder: Params, adapter: Params) -> Params:
    """The decoder's parameters with a LoraWeight in the place of each adapted weight, for `decoder.forward`."""

    def attach_one(weight, inputs, down, up, magnitude=None):
        gain = None
        if magnitude is not None:
            adapted = _adapted_weight(weight, down, up, config.scale)
            gain = magnitude / jax.lax.stop_gradient(_column_norms(adapted, inputs))
        return LoraWeight(weight, down, up, gain, config.scale)

    return _map_adapted(attach_one, decoder, adapter)


def merge(config: LoraConfig, decoder: Params, adapter: Params, dtype=None) -> Params:
    """Parameters that need no adapter: W + s A B, for DoRA m (W + s A B)/‖W + s A B‖.

    In bfloat16 an entry of W stays as it is until s A B is half of its last bit: at least 0.2 % of it.

    Args:
      dtype: of the adapted weights; None: each keeps its own.
    """

    def merge_one(weight, inputs, down, up, magnitude=None):
        adapted = _adapted_weight(weight, down, up, config.scale)
        if magnitude is not None:
            gain = magnitude / _column_norms(adapted, inputs)
            adapted = adapted * gain.reshape((1,) * inputs + magnitude.shape)
        return adapted.astype(dtype or weight.dtype)

    return _map_adapted(merge_one, decoder, adapter)


def unmerge(config: LoraConfig, merged: Params, adapter: Params) -> Params:
    """The base of a merged adapter, up to rounding. Raises ValueError for DoRA, whose merge loses ‖W + s A B‖."""
    if config.use_dora:
        raise ValueError("a merged DoRA adapter cannot be removed: keep the base")
    return merge(dataclasses.replace(config, alpha=-config.alpha), merged, adapter)


def _adapted_weight(weight, down, up, scale: float):
    """W + s A B in float32."""
    rank = up.shape[0]
    product = down.astype(jnp.float32).reshape(-1, rank) @ up.astype(jnp.float32).reshape(rank, -1)
    return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)


def _column_norms(weight, inputs: int):
    """Norm of each output's column, in float32."""
    return jnp.sqrt((weight.astype(jnp.float32) ** 2).sum(axis=tuple(range(inputs))))


def _map_adapted(fn: Callable, decoder: Params, adapter: Params) -> Params:
    """The decoder with fn(weight, inputs, down=.., up=.., ..) in the place of each adapted weight, stacked or not."""

    def is_adapter_leaf(_, node):
        return not isinstance(node.get("up", {}), dict)

    weights = flatten_dict(decoder)
    for path, leaf in flatten_dict(adapter, is_leaf=is_adapter_leaf).items():
        inputs = INPUT_AXES[path[-1]]

        def of_weight(weight, leaf, inputs=inputs):
            return fn(weight, inputs, **leaf)

        of_path = of_weight if layers_of(path) is None else jax.vmap(of_weight)
        weights[path] = of_path(weights[path], leaf)
    return unflatten_dict(weights)


# ------------------------------------------------------------------------------------------------- making an adapter


def adaptable(decoder: Params) -> dict[str, tuple]:
    """Every weight that may be adapted (no router, no expert): "layers/3/attention/query" -> the path as a tuple."""
    axes = {"attention": 3, "mlp": 2}
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(decoder):
        path = tuple(key.key for key in keys)
        if path[-1] in INPUT_AXES and leaf.ndim - (layers_of(path) is not None) == axes[path[-2]]:
            found["/".join(map(str, path))] = path
    return found


def targets(config: LoraConfig, decoder: Params) -> list[tuple]:
    """Paths of the weights that are adapted. Raises ValueError if a pattern matches none."""
    paths = adaptable(decoder)
    chosen = param_filters.match_paths(paths, config.targets)
    return [path for name, path in paths.items() if name in chosen]


def init(config: LoraConfig, decoder: Params, key: Array) -> Params:
    """A uniform in ±1/√in, B zero, m the norms of W: a new adapter changes nothing.

    Stacked layers get the values that they would have one by one.
    """
    weights = flatten_dict(decoder)
    paths = targets(config, decoder)
    single = sorted(path for stacked in paths for path in _single_paths(stacked))
    number_of = {path: number for number, path in enumerate(single)}
    tree = {}
    for path in paths:
        numbers = jnp.array([number_of[one] for one in _single_paths(path)])
        keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
        init_one = partial(_init_adapter, config, INPUT_AXES[path[-1]])
        if layers_of(path) is None:
            tree[path] = init_one(weights[path], keys[0])
        else:
            tree[path] = jax.vmap(init_one)(weights[path], keys)
    return unflatten_dict(tree)


def _single_paths(path: tuple) -> list[tuple]:
    """The path of each weight in a stack, or the one path of a weight that is in none."""
    layers = layers_of(path)
    return [path] if layers is None else [("layers", layer, *path[2:]) for layer in layers]


def _init_adapter(config: LoraConfig, inputs: int, weight, key: Array) -> Params:
    """The new adapter of one weight."""
    inner = weight.shape[:inputs]
    outer = weight.shape[inputs:]
    bound = math.prod(inner) ** -0.5
    adapter = {
        "down": jax.random.uniform(key, (*inner, config.rank), minval=-bound, maxval=bound),
        "up": jnp.zeros((config.rank, *outer)),
    }
    if config.use_dora:
        adapter["magnitude"] = _column_norms(weight, inputs)
    return adapter


def adapter_axes(config: LoraConfig, decoder_axes: Params, shapes: Params) -> Params:
    """Logical axis names of each of `init`'s arrays: those of the weights, None along the rank."""
    weights = flatten_dict(decoder_axes)
    tree = {}
    for path in targets(config, shapes):
        tree[path] = axes_beside(path, weights[path])
        if not config.use_dora:
            del tree[path]["magnitude"]
    return unflatten_dict(tree)


def axes_beside(path: tuple, names: tuple) -> dict[str, tuple]:
    """Logical axis names of the arrays beside a weight that has these: None along the rank."""
    stacked = int(layers_of(path) is not None)
    before, names = names[:stacked], names[stacked:]
    inputs = INPUT_AXES[path[-1]]
    return {
        "down": (*before, *names[:inputs], None),
        "up": (*before, None, *names[inputs:]),
        "magnitude": (*before, *names[inputs:]),
    }
