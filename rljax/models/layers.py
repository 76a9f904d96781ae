"""The layers of a decoder as Flax modules (nnx): norm, attention, MLP, mixture of experts, block, and the whole stack.

Nothing outside the models package sees a module: `models.decoder` has the pure functions.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.models import batch_invariant as invariant
from rljax.models import caches, rope
from rljax.models.attention import AttentionMask, SharedPrefixMask, attend, attend_cached, flatten_groups
from rljax.models.config import DecoderConfig
from rljax.models.lora import LoraWeight
from rljax.models.moe import route, sharded_moe_mlp
from rljax.models.partition import mesh_axes
from rljax.models.stacks import stack_name
from rljax.ops.logprobs import tree_sum
from rljax.types import SharedPrefix

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def _matrix(rngs: nnx.Rngs, shape, axes, fan_in) -> nnx.Param:
    """A normal matrix of standard deviation 1/√fan_in, with logical axis names for the sharding rules."""
    value = jax.random.normal(rngs.params(), shape) * fan_in**-0.5
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _vector(value: float, shape, axes) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), out_sharding=axes, eager_sharding=False)


def _bias(present: bool, shape, axes) -> nnx.Param | None:
    return _vector(0.0, shape, axes) if present else None


def _value(param: nnx.Param | None):
    """What the parameter holds: an array, or a LoraWeight, which `param[...]` would index."""
    return None if param is None else param.get_value()


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | LoraWeight,
    bias: Float[Array, "..."] | None = None,
    inputs: int = 1,
    batch_invariant: bool = False,
) -> Float[Array, "..."]:
    """x · W + b over the last `inputs` axes of x, which are the first of W, as one two-dimensional matmul in x's dtype.

    Measured on CPU: the gradient of [512 9 128] x [128 352] takes half the time of the same product on three axes.

    Args:
      batch_invariant: multiply by `batch_invariant.matmul`.
    """
    batch = x.shape[: x.ndim - inputs]
    inner = weight.shape[:inputs]
    outer = weight.shape[inputs:]
    rows = math.prod(batch)
    flat = x.reshape(rows, math.prod(inner))
    matmul = invariant.matmul if batch_invariant else jnp.matmul
    if isinstance(weight, LoraWeight):
        out = weight.apply(flat, inputs, matmul)
    else:
        out = matmul(flat, weight.astype(x.dtype).reshape(math.prod(inner), math.prod(outer)))
    out = out.reshape(*batch, *outer)
    if bias is None:
        return out
    return out + bias.astype(x.dtype).reshape((1,) * len(batch) + outer)


def _project_by(module: nnx.Module, name: str, x, inputs: int = 1):
    """x times the module's weight of this name, plus its bias."""
    weight = _value(getattr(module, name))
    bias = _value(getattr(module, f"{name}_bias"))
    return project(x, weight, bias, inputs, module.config.batch_invariant)


class RMSNorm(nnx.Module):
    """x / rms(x) · (scale + offset) over x's last axes, as many as the scale has; computed in float32."""

    def __init__(self, config: DecoderConfig, shape: tuple[int, ...], axes: tuple = (None,)):
        self.scale = _vector(1.0 - config.norm_offset, shape, axes)
        self.epsilon = config.rms_norm_eps
        self.offset = config.norm_offset
        self.batch_invariant = config.batch_invariant

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        axes = tuple(range(-scale.ndim, 0))
        if self.batch_invariant:
            squares = (x32**2).reshape(*x.shape[: -scale.ndim], scale.size)
            mean = jnp.expand_dims(tree_sum(squares) / scale.size, axes)
        else:
            mean = (x32**2).mean(axis=axes, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean + self.epsilon)
        return (normed * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention, with rotary positions where the layer has a table."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        D, H, KV, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        if config.fused_projections:
            self.fused = _matrix(rngs, (D, KV, H // KV + 2, K), ("embed", "kv_heads", None, None), D)
            self.fused_bias = _bias(config.qkv_bias, (KV, H // KV + 2, K), ("kv_heads", None, None))
        else:
            self.query = _matrix(rngs, (D, H, K), ("embed", "heads", None), D)
            self.key = _matrix(rngs, (D, KV, K), ("embed", "kv_heads", None), D)
            self.value = _matrix(rngs, (D, KV, K), ("embed", "kv_heads", None), D)
            self.query_bias = _bias(config.qkv_bias, (H, K), ("heads", None))
            self.key_bias = _bias(config.qkv_bias, (KV, K), ("kv_heads", None))
            self.value_bias = _bias(config.qkv_bias, (KV, K), ("kv_heads", None))
        self.out = _matrix(rngs, (H, K, D), ("heads", None, "embed"), H * K)
        self.out_bias = _bias(config.out_bias, (D,), (None,))
        if config.qk_norm == "head":
            self.query_norm = RMSNorm(config, (K,))
            self.key_norm = RMSNorm(config, (K,))
        elif config.qk_norm == "full":
            self.query_norm = RMSNorm(config, (H, K), ("heads", None))
            self.key_norm = RMSNorm(config, (KV, K), ("kv_heads", None))
        table = config.rope(layer)
        self.table = None if table is None else config.rope_tables().index(table)
        self.window = config.window(layer)
        self.config = config

    def __call__(
        self,
        x,
        mask: AttentionMask | SharedPrefixMask,
        rotations: list[tuple],
        cache: caches.LayerCache | None,
        place: caches.Place | None,
    ):
        """The change [B T D] of the hidden states, and the layer's cache with the keys and values of x.

        place: where they stand in the cache.
        """
        config = self.config
        query, key, value = self.projections(x)
        if config.qk_norm != "none":
            query = self.query_norm(query)
            key = self.key_norm(key)
        if self.table is not None:
            cos, sin = rotations[self.table]
            query = rope.apply_rope(query, cos, sin)
            key = rope.apply_rope(key, cos, sin)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        settings = {
            "scale": scale,
            "window": self.window,
            "softcap": config.attention_softcap,
            "batch_invariant": config.batch_invariant,
        }
        if cache is not None:
            cache = cache.append(key, value, place.start)
        if cache is None or mask.keys is None:  # nothing came before: the keys are those of x
            settings |= {"implementation": config.attn_implementation, "sharding": config.hidden_sharding}
            out = attend(query, key, value, mask, **settings)
        else:
            keys_values = cache.keys_values()
            if self.window is not None and place.ends is not None:
                keys_values, mask = caches.within_window(keys_values, mask, place.ends, self.window)
            out = attend_cached(query, keys_values, mask, **settings)
        return _project_by(self, "out", out, inputs=2), cache

    def projections(self, x):
        """Queries [B T H K], keys and values [B T KV K]."""
        if not self.config.fused_projections:
            return [_project_by(self, name, x) for name in ("query", "key", "value")]
        out = _project_by(self, "fused", x)
        query = out[..., :-2, :]
        return query.reshape(*x.shape[:-1], self.config.num_heads, -1), out[..., -2, :], out[..., -1, :]


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        if config.fused_projections:
            self.fused = _matrix(rngs, (D, 2, F), ("embed", None, "mlp"), D)
            self.fused_bias = _bias(config.mlp_bias, (2, F), (None, "mlp"))
        else:
            self.gate = _matrix(rngs, (D, F), ("embed", "mlp"), D)
            self.up = _matrix(rngs, (D, F), ("embed", "mlp"), D)
            self.gate_bias = _bias(config.mlp_bias, (F,), ("mlp",))
            self.up_bias = _bias(config.mlp_bias, (F,), ("mlp",))
        self.down = _matrix(rngs, (F, D), ("mlp", "embed"), F)
        self.down_bias = _bias(config.mlp_bias, (D,), (None,))
        self.config = config

    def __call__(self, x, routing=None):
        """The change [B T D] of the hidden states, and None: there are no experts to choose."""
        if self.config.fused_projections:
            both = _project_by(self, "fused", x)
            gate = both[..., 0, :]
            up = both[..., 1, :]
        else:
            gate = _project_by(self, "gate", x)
            up = _project_by(self, "up", x)
        return _project_by(self, "down", ACTIVATIONS[self.config.activation](gate) * up), None


class MoE(nnx.Module):
    """A mixture of experts in the place of an MLP."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, E, F = config.hidden_size, config.moe.num_experts, config.moe.intermediate_size
        self.router = _matrix(rngs, (D, E), ("embed", None), D)
        self.gate = _matrix(rngs, (E, D, F), ("experts", "embed", "mlp"), D)
        self.up = _matrix(rngs, (E, D, F), ("experts", "embed", "mlp"), D)
        self.down = _matrix(rngs, (E, F, D), ("experts", "mlp", "embed"), F)
        self.config = config

    def __call__(self, x, routing: Int[Array, "B T k"] | None = None):
        """The change [B T D] of the hidden states, and the experts [B T k]: those of `routing`, or the router's."""
        B, T, D = x.shape
        flat = x.reshape(B * T, D)
        replayed = None if routing is None else routing.reshape(B * T, -1)
        chosen, weights = route(flat @ self.router[...].astype(x.dtype), self.config.moe, replayed)
        chosen, weights = (found.reshape(B, T, -1) for found in (chosen, weights))
        experts = [weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down)]
        activation = ACTIVATIONS[self.config.activation]
        return sharded_moe_mlp(x, chosen, weights, *experts, activation, self.config.hidden_sharding), chosen


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after each, or both."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        if config.norms in ("pre", "both"):
            self.attention_norm = RMSNorm(config, (config.hidden_size,))
            self.mlp_norm = RMSNorm(config, (config.hidden_size,))
        if config.norms in ("post", "both"):
            self.attention_post_norm = RMSNorm(config, (config.hidden_size,))
            self.mlp_post_norm = RMSNorm(config, (config.hidden_size,))
        self.attention = Attention(config, layer, rngs)
        self.mlp = MoE(config, rngs) if config.is_moe_layer(layer) else MLP(config, rngs)
        self.has_pre_norms = config.norms != "post"
        self.has_post_norms = config.norms != "pre"
        self.hidden_sharding = config.hidden_sharding

    def __call__(self, x, cache: caches.LayerCache | None, routing, mask, rotations, place):
        """x [B T D] after the block, its cache with the new columns, and the experts [B T k] of a mixture."""
        x = _with_sharding(x, self.hidden_sharding)
        normed = self.attention_norm(x) if self.has_pre_norms else x
        change, cache = self.attention(normed, mask, rotations, cache, place)
        x = x + (self.attention_post_norm(change) if self.has_post_norms else change)
        normed = self.mlp_norm(x) if self.has_pre_norms else x
        change, chosen = self.mlp(normed, routing)
        x = x + (self.mlp_post_norm(change) if self.has_post_norms else change)
        return x, cache, chosen


class Decoder(nnx.Module):
    """Embedding, blocks, last norm, and the head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, V = config.hidden_size, config.vocab_size
        # Tables are split along the vocabulary only: XLA would gather a table that is split along both axes whole at
        # each use.
        self.embedding = _matrix(rngs, (V, D), ("vocabulary", None), D)
        if config.scan_layers:
            blocks = {stack_name(layers): Block(config, layers[0], rngs) for layers in config.layer_stacks()}
            self.layers = nnx.Dict(blocks)  # shaped like one layer of each stack; the parameters are those of all
        else:
            self.layers = nnx.List([Block(config, i, rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config, (D,))
        if not config.tie_word_embeddings:
            self.head = _matrix(rngs, (D, V), (None, "vocabulary"), D)
        self.config = config

    def __call__(self, tokens, positions, segments, cache, routing, prefix: SharedPrefix | None, context):
        """Hidden states [B T D] after the last norm, and the cache with the new columns."""
        config = self.config
        if cache is None:
            place = None
            mask = AttentionMask(positions, segments, context=context)
            layers = [None] * len(self.layers)
            if prefix is not None:  # one row for each group from here on: its prefix, then its rows
                mask = SharedPrefixMask.join(AttentionMask(prefix.positions, prefix.segments), mask)
                tokens = flatten_groups(prefix.inputs, tokens)
                positions = flatten_groups(prefix.positions, positions)
                routing = None if routing is None else flatten_groups(prefix.routing, routing)
        else:
            start = cache["length"]
            cache = caches.append_positions(cache, positions, segments)
            place = caches.Place(start, caches.ends(cache))
            is_whole = caches.is_filled_by(cache, tokens.shape[1])
            mask = AttentionMask(positions, segments) if is_whole else caches.cache_mask(cache, positions, segments)
            layers = caches.layer_caches(cache)

        x = self.embedding[...][tokens].astype(config.dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        rotations = [rope.cos_sin(positions, table) for table in config.rope_tables()]
        moe_layers = config.moe.layers if config.moe else ()
        replayed = {} if routing is None else {layer: routing[:, :, m] for m, layer in enumerate(moe_layers)}
        run = self._scan if config.scan_layers else self._unroll
        x, layers, chosen = run(x, layers, replayed, mask, rotations, place)
        if cache is not None:
            cache = {**cache, "layers": [layer.own for layer in layers]}
            if moe_layers:
                experts = jnp.stack([chosen[layer] for layer in moe_layers], axis=2)
                cache["routing"] = caches.write_columns(cache["routing"], experts, start)
        x = _with_sharding(x, config.hidden_sharding)
        if prefix is not None:
            _, x = mask.split(x)
        return self.norm(x), cache

    def _unroll(self, x, layers: list, replayed: dict[int, Array], *settings):
        """x after all blocks, the layers' caches with the new columns, and the experts [B T k] by layer."""
        new_layers = []
        chosen = {}
        for i, block in enumerate(self.layers):
            run = self._with_remat(block, layers[i])
            x, layer, chosen[i] = run(x, layers[i], replayed.get(i), *settings)
            new_layers.append(layer)
        return x, new_layers, chosen

    def _scan(self, x, layers: list, replayed: dict[int, Array], *settings):
        """`_unroll` of stacked layers: scans one after the other."""
        caches_of = dict(zip(self.config.layer_stacks(), layers, strict=True))
        chosen = {}
        for stacks in self.config.layer_scans():
            x, new_caches, experts = self._scan_stacks(x, stacks, caches_of, replayed, settings)
            caches_of |= new_caches
            for layers_of_stack, found in experts.items():
                chosen |= {} if found is None else dict(zip(layers_of_stack, found, strict=True))
        return x, list(caches_of.values()), chosen

    def _scan_stacks(self, x, stacks: tuple[range, ...], caches_of: dict, replayed: dict[int, Array], settings: tuple):
        """One scan, whose body has a layer of each stack. The stacks' own caches are carried: written in place.

        Returns x, the caches by stack, and the experts [n B T k] by stack.
        """
        blocks = [nnx.split(self.layers[stack_name(layers)]) for layers in stacks]
        parameters = [state for _, state in blocks]
        is_cached = caches_of[stacks[0]] is not None
        own = [caches_of[layers].own if is_cached else None for layers in stacks]
        shared = [caches_of[layers].shared if is_cached else None for layers in stacks]
        experts = [
            jnp.stack([replayed[layer] for layer in layers]) if layers[0] in replayed else None for layers in stacks
        ]

        def body(carry, of_period):
            x, own = carry
            place, parameters, experts = of_period
            new_own = []
            chosen = []
            for k, (definition, _) in enumerate(blocks):
                layer = caches.LayerCache(shared[k], own[k], place) if is_cached else None
                run = self._with_remat(nnx.merge(definition, parameters[k]), layer)
                x, layer, found = run(x, layer, experts[k], *settings)
                new_own.append(layer.own if is_cached else None)
                chosen.append(found)
            return (x, new_own), chosen

        places = jnp.arange(len(stacks[0]))
        (x, own), chosen = jax.lax.scan(body, (x, own), (places, parameters, experts))
        new_caches = {}
        if is_cached:
            new_caches = {layers: caches.LayerCache(shared[k], own[k]) for k, layers in enumerate(stacks)}
        return x, new_caches, dict(zip(stacks, chosen, strict=True))

    def _with_remat(self, block: Block, cache: caches.LayerCache | None):
        """The block, whose activations the backward pass recomputes: all of them ("full"), or all but matmuls ("dots").

        There is no backward pass through a cache.
        """
        if self.config.remat == "none" or cache is not None:
            return block
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
        return jax.checkpoint(lambda *args: block(*args), policy=policy, prevent_cse=not self.config.scan_layers)

    def logits(self, hidden):
        """[.. D] -> [.. V] in float32: a sum of bfloat16 products keeps the precision of its accumulation."""
        config = self.config
        table = self.embedding[...].T if config.tie_word_embeddings else self.head[...]
        flat = hidden.reshape(-1, hidden.shape[-1])
        table = table.astype(hidden.dtype)
        if config.hidden_sharding is not None:
            flat, table, placements = _place_logits(config.hidden_sharding, flat, table)
        if config.batch_invariant:
            logits = invariant.matmul(flat, table, jnp.float32)
        else:
            logits = jnp.matmul(flat, table, preferred_element_type=jnp.float32)
        if config.hidden_sharding is not None:
            for placement in placements:
                logits = _with_sharding(logits, placement)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits.reshape(*hidden.shape[:-1], -1)


def _with_sharding(x, sharding: NamedSharding | None):
    """x [B ..] in this sharding, but for rows that do not divide over its devices: they go over fewer (`_row_axes`)."""
    if sharding is None:
        return x
    spec = PartitionSpec(_row_axes(sharding, len(x)), *sharding.spec[1:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))


def _row_axes(sharding: NamedSharding, rows: int) -> tuple[str, ...] | None:
    """The first mesh axes of its rows, as many as divide them."""
    axes = mesh_axes(sharding, 0)
    while axes and rows % math.prod(sharding.mesh.shape[name] for name in axes):
        axes = axes[:-1]
    return axes or None


def _place_logits(sharding: NamedSharding, hidden: Float[Array, "N D"], table: Float[Array, "D V"]):
    """Hidden states and table as their product is best computed on the mesh, and the shardings of the logits [N V]: of
    the product, then the final one.

    Each device gets whole rows of logits: sums over the vocabulary then stay on a device. Where tokens are many they
    stay where they are and the table comes to them; where they are few (decoding) they go to each part of the table,
    and their logits come back. XLA by itself collects the table, or all rows' logits, on every device.
    """
    mesh = sharding.mesh
    axes = _all_axes(sharding)
    by_token = NamedSharding(mesh, PartitionSpec(axes, None))
    cuts = ("tensor", "fsdp")  # of the table
    others = tuple(name for name in mesh_axes(sharding, 0) if name not in cuts)
    N, D = hidden.shape
    V = table.shape[1]
    half, single = 2, 4  # bytes
    if N * D * half + N * V * single // mesh.size < D * V * half:
        hidden = _with_sharding(hidden, NamedSharding(mesh, PartitionSpec(others, None)))
        table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec(None, cuts)))
        return hidden, table, (NamedSharding(mesh, PartitionSpec(others, cuts)), by_token)
    replicated = NamedSharding(mesh, PartitionSpec(None, None))
    return _with_sharding(hidden, by_token), _with_sharding(table, replicated), (by_token,)


def _all_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """All axes of the mesh, those of the rows first."""
    return tuple(dict.fromkeys((*mesh_axes(sharding, 0), *mesh_axes(sharding, 1), *sharding.mesh.axis_names)))
