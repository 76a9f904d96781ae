"""One decoder for all Llama-like families, which differ in the numbers and booleans of a config, not in subclasses.

`models.layers` defines the layers; here are the pure functions of a plain nested dict of arrays. One attention rule
serves training, prefill, decoding and packing: a query attends to the keys of its own segment at positions up to its
own, in a layer with a sliding window only within it.

Dtypes are decided in two places: parameters have the dtype they were made or loaded with (float32 masters, as a rule),
and the embeddings are cast to `DecoderConfig.dtype`. All layers follow their input; norms, rotary positions, softmax
(also of routers) and logits are computed in float32.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.models import caches, stacks
from rljax.models.config import DecoderConfig as DecoderConfig
from rljax.models.layers import Decoder
from rljax.models.lora import LoraWeight, attach, axes_beside, merge
from rljax.models.partition import num_shards
from rljax.types import LM, Params, SharedPrefix, Trajectory

# ---------------------------------------------------------------------------------------------------------- parameters


@lru_cache
def _definition(config: DecoderConfig):
    abstract_decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return nnx.split(abstract_decoder, nnx.Param)


def init(config: DecoderConfig, key: Array) -> Params:
    """Random parameters. Layers are keyed by integers: nnx orders its children by key, and "10" < "2".

    With `scan_layers` they have the same values, stacked.
    """
    if config.scan_layers:
        return stacks.stack(config.layer_scans(), init(dataclasses.replace(config, scan_layers=False), key))
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))


def abstract(config: DecoderConfig) -> Params:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    shapes = nnx.to_pure_dict(_definition(config)[1])
    if not config.scan_layers:
        return shapes

    def stacked(layers: range, block: Params) -> Params:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(layers), *x.shape), x.dtype), block)

    return {**shapes, "layers": _map_stacks(stacked, config, shapes["layers"])}


def _map_stacks(fn: Callable[[range, Params], Params], config: DecoderConfig, blocks: Params) -> Params:
    """fn(layers of the stack, its block) for each stack."""
    return {name: fn(layers, blocks[name]) for layers in config.layer_stacks() for name in [stacks.stack_name(layers)]}


def param_axes(config: DecoderConfig) -> Params:
    """For each parameter a tuple of logical axis names, for the sharding rules of `train.mesh`."""
    specs = nnx.to_pure_dict(nnx.get_partition_spec(_definition(config)[1]))

    def names(tree, *before: str) -> Params:
        return jax.tree.map(lambda spec: (*before, *spec), tree, is_leaf=lambda x: isinstance(x, jax.P))

    if not config.scan_layers:
        return names(specs)
    blocks = _map_stacks(lambda _, block: names(block, "layers"), config, specs["layers"])
    return {**names(specs), "layers": blocks}


def full_params(config: DecoderConfig, params: Params, frozen: Params, adapt: Callable = attach) -> Params:
    """All that the model needs: frozen["base"] overwritten by the trained `params`, with params["lora"] attached.

    Parameters that are not trained are in frozen["base"]. With {} as `params` the model is the base itself: an
    adapter's reference policy needs no copy.

    Args:
      adapt: `lora.attach`, or `lora.merge`.
    """
    tree = overwrite(on_device(frozen["base"]), params) if "base" in frozen else dict(params)
    if "lora" not in tree:
        return tree
    if config.adapter is None:
        raise ValueError('params has an adapter ("lora"), but config.adapter is None; legal: a LoraConfig')
    adapter = tree.pop("lora")
    return tree | {"decoder": adapt(config.adapter, tree["decoder"], adapter)}


def on_device(frozen: Params) -> Params:
    """Inside a compiled function: parameters that may be kept in the host's memory.

    Only for those: what is computed from the result counts as committed to its device.
    """
    return jax.device_put(frozen, jax.memory.Space.Device)


def overwrite(base: Params, params: Params) -> Params:
    """Nested dicts merged; where both have a leaf, that of `params`."""
    out = dict(base)
    for name, value in params.items():
        inner = base.get(name)
        out[name] = overwrite(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


@lru_cache
def _param_names(config: DecoderConfig) -> frozenset[str]:
    return frozenset(_names(abstract(config)))


def _names(params: Params) -> set[str]:
    return {"/".join(map(str, path)) for path in flatten_dict(params)}


def _check_names(config: DecoderConfig, params: Params) -> None:
    """Raises ValueError for the parameters of another decoder: flax binds them by their order, and counts them."""
    wanted, found = _param_names(config), _names(params)
    if found != wanted:
        raise ValueError(
            f"these are another decoder's parameters: {sorted(wanted - found)[:3]} missing, of which the config has "
            f"{len(wanted)}, and {sorted(found - wanted)[:3]} too many"
        )


# ------------------------------------------------------------------------------------------------------------- forward


def init_cache(config: DecoderConfig, rows: int, length: int) -> caches.Cache:
    """An empty cache for `rows` rows of up to `length` tokens."""
    moe = config.moe
    stacked = [(len(layers),) for layers in config.layer_stacks()] if config.scan_layers else [()] * config.num_layers
    routing = None if moe is None else (len(moe.layers), moe.num_experts_per_tok, moe.routing_dtype)
    return caches.init(stacked, rows, length, config.num_kv_heads, config.head_dim, config.dtype, routing=routing)


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: caches.Cache | None = None,
    routing: Int[Array, "B T M k"] | None = None,
    prefix: SharedPrefix | None = None,
    context: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], caches.Cache | None]:
    """Hidden states after the last norm, and the cache with the new columns.

    Without a cache the tokens attend to each other; with one they are appended to it at each row's own length, and
    attend to its columns.

    Args:
      routing: the experts to use in each of the M mixture-of-experts layers; None: the routers choose.
      prefix: tokens before those of the rows, computed once for the rows that share them; only without a cache.
      context: the segment that each segment continues, in packed rows; 0: none; only without a cache and a prefix.
    """
    _check_names(config, params)
    if (cache is not None) + (prefix is not None) + (context is not None) > 1:
        raise ValueError("each holds what came before the tokens; legal: one of cache, prefix and context")
    decoder = nnx.merge(_definition(config)[0], params)
    hidden, cache = decoder(tokens, positions, segments, cache, routing, prefix, context)
    return hidden, None if cache is None else caches.constrain(cache, config.hidden_sharding)


def hidden_of(config: DecoderConfig, params: Params, traj: Trajectory) -> Float[Array, "B T D"]:
    """Hidden states of a trajectory's rows after the last norm."""
    before = {"prefix": traj.prefix, "context": traj.context}
    hidden, _ = forward(config, params, traj.inputs, traj.positions, traj.segments, routing=traj.routing, **before)
    return hidden


def logits(config: DecoderConfig, params: Params, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
    """Logits of hidden states, in float32."""
    return nnx.merge(_definition(config)[0], params).logits(hidden)


# ------------------------------------------------------------------------------------------------------------ sampling


def fuse_projections(config: DecoderConfig, params: Params) -> Params:
    """The parameters for a config with `fused_projections`: fewer and larger matmuls, which take most of decoding."""

    def fused_block(block: Params) -> Params:
        mlp = block["mlp"] if "router" in block["mlp"] else _fused_mlp(config, block["mlp"])
        return block | {"attention": _fused_attention(config, block["attention"]), "mlp": mlp}

    return params | {"layers": {i: fused_block(block) for i, block in params["layers"].items()}}


def cast_matrices(config: DecoderConfig, params: Params) -> Params:
    """The parameters as layers compute with them: in `config.dtype`, but for the scales of norms and DoRA's gains."""

    def cast(path: tuple, x: Array) -> Array:
        name = getattr(path[-1], "key", getattr(path[-1], "name", None))
        return x if name in ("scale", "gain") else x.astype(config.dtype)

    return jax.tree.map_with_path(cast, params)


def _fused_attention(config: DecoderConfig, attention: Params) -> Params:
    """Queries, keys and values in one matrix [D KV H/KV+2 K]."""
    projections = ("query", "key", "value")

    def by_kv_head(x):
        return x.reshape(*x.shape[:-2], config.num_kv_heads, -1, config.head_dim)

    out = {name: x for name, x in attention.items() if name.removesuffix("_bias") not in projections}
    for suffix in ("", "_bias") if config.qkv_bias else ("",):
        heads = [by_kv_head(attention[name + suffix]) for name in projections]
        out["fused" + suffix] = jnp.concatenate(heads, axis=-2)
    return out


def _fused_mlp(config: DecoderConfig, mlp: Params) -> Params:
    """Gate and up in one matrix [D 2 F]."""
    out = {name: x for name, x in mlp.items() if name.removesuffix("_bias") not in ("gate", "up")}
    for suffix in ("", "_bias") if config.mlp_bias else ("",):
        out["fused" + suffix] = jnp.stack([mlp["gate" + suffix], mlp["up" + suffix]], axis=-2)
    return out


def gather_layers(config: DecoderConfig, params: Params) -> Params:
    """The parameters with the matrices of layers as a device computes with them: in `config.dtype`, and no longer split
    along the axis `embed`, which is FSDP's.

    Tables of the vocabulary stay where they are: to sample, each device uses its part.
    """
    axes = flatten_dict(param_axes(config))

    def gather(x: Array, names: tuple, dtype=config.dtype) -> Array:
        if "embed" not in names:
            return x
        spec = PartitionSpec(*[None if name == "embed" else PartitionSpec.UNCONSTRAINED for name in names])
        return jax.lax.with_sharding_constraint(x.astype(dtype), NamedSharding(config.hidden_sharding.mesh, spec))

    def gather_weight(path: tuple, weight: Array | LoraWeight) -> Array | LoraWeight:
        if not isinstance(weight, LoraWeight):
            return gather(weight, axes[path])
        beside = axes_beside(path, axes[path])
        gain = None if weight.gain is None else gather(weight.gain, beside["magnitude"], weight.gain.dtype)
        return weight.replace(
            weight=gather(weight.weight, axes[path]),
            down=gather(weight.down, beside["down"]),
            up=gather(weight.up, beside["up"]),
            gain=gain,
        )

    return unflatten_dict({path: gather_weight(path, weight) for path, weight in flatten_dict(params).items()})


def _of_whole_rows(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of hidden states in which the mesh axes of columns shard the rows too."""
    if sharding is None:
        return None
    rows, columns, features = (axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(rows + columns, None, features[0]))


def _logits_of_whole_rows(config: DecoderConfig, params: Params, hidden: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """`logits` with all of a row on the devices that have the row, to sample from."""
    found = logits(config, params, hidden)
    if config.hidden_sharding is None:
        return found
    rows = PartitionSpec(config.hidden_sharding.spec[0])
    return jax.lax.with_sharding_constraint(found, NamedSharding(config.hidden_sharding.mesh, rows))


@lru_cache
def language_model(config: DecoderConfig, devices: int | None = None) -> LM:
    """The decoder as the sampler's `LM`. Its parameters are those that `full_params` takes.

    On one device `prepare` casts matrices to `config.dtype`, once for all tokens, and fuses projections: on a mesh that
    would move weights. It does not fuse where the config is batch-invariant: for a matrix with other columns XLA may
    choose another kernel. An adapter is merged into the weights first; not in bfloat16, which would round small changes
    away: with an adapter nothing is fused there.
    With `gather_for_generation` it gathers the layers' weights on a mesh: else decoding gathers them for each token.

    A sampler has no long sequence to split: the devices that have columns of a row elsewhere have rows here.

    Args:
      devices: how many hold the parameters; None: all of this machine.
    """
    on_one_device = config.hidden_sharding is None and (devices or jax.device_count()) == 1
    can_merge = config.adapter is None or config.dtype == "float32"
    is_fused = on_one_device and can_merge and not config.batch_invariant
    config = dataclasses.replace(config, hidden_sharding=_of_whole_rows(config.hidden_sharding))
    decoding_config = dataclasses.replace(config, fused_projections=is_fused)

    def prepare(params: Params, frozen: Params) -> tuple[Params, Params]:
        adapt = partial(merge, dtype=config.dtype) if is_fused else attach
        params = full_params(config, params, frozen, adapt)["decoder"]
        if on_one_device:
            params = cast_matrices(config, params)
        if is_fused:
            params = fuse_projections(config, params)
        if config.gather_for_generation and config.hidden_sharding is not None:
            params = gather_layers(config, params)
        return params, {}

    return LM(
        init_cache=partial(init_cache, config),
        forward=lambda params, _, *args: forward(decoding_config, params, *args),
        logits=lambda params, _, hidden: _logits_of_whole_rows(decoding_config, params, hidden),
        gather=partial(caches.gather, sharding=config.hidden_sharding),
        scatter=caches.scatter,
        fork=caches.repeat_kv if config.batch_invariant else caches.fork,
        grow=caches.grow,
        crop=caches.crop,
        prepare=prepare,
        routing=None if config.moe is None else caches.routing,
        row_shards=num_shards(config.hidden_sharding, 0),
    )
