"""One decoder for the Llama-like families, told apart by numbers and booleans, not by subclasses.

Flax modules (nnx) define the layers; outside this file parameters are a plain nested dict of arrays and everything is a
pure function of them. One attention rule serves training, prefill, decoding and packing: a query sees the keys of its
own segment at positions up to its own, in a layer with a window only so far back.

Dtypes are decided in two places: parameters are whatever they were made or read as (float32 masters, as a rule), and
`DecoderConfig.dtype` is what the embedding is cast to. All layers follow their input; norms, rotations, softmax (of
experts too) and logits are float32 inside.
"""

import dataclasses
import math
from functools import lru_cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rljax.models import caches, rope
from rljax.models.attention import Implementation, Sight, attend, look_up
from rljax.models.batch_invariant import LANE, ROWS, at_least
from rljax.models.lora import Adapted, Lora, attach
from rljax.models.moe import Experts, mix, route
from rljax.models.rope import Rope
from rljax.ops.logprobs import tree_sum
from rljax.types import LM, Params

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. What stands before the first default is a Llama: grouped-query attention, rotary positions,
    RMSNorm before each block, SwiGLU. The rest is what other families do differently."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int = 2048  # the context
    ropes: tuple[Rope | None, ...] = ()  # layer by layer, None: no positions; (): θ = 10,000 in all
    windows: tuple[int | None, ...] = ()  # layer by layer, how many positions a query sees, its own included; (): all
    norm_epsilon: float = 1e-5
    norms: Literal["before", "after", "both"] = "before"  # where a block's norms stand
    norm_offset: float = 0.0  # added to the scale of a norm (Gemma: 1)
    qk_norm: Literal["none", "head", "whole"] = "none"  # of queries and keys: head by head, or before they are split
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0  # of the hidden state that the table gives (Gemma: √width)
    attention_scale: float | None = None  # of scores; None: head_dim^-½
    attention_softcap: float | None = None  # c in c tanh(score/c)
    logit_softcap: float | None = None
    experts: Experts | None = None
    adapter: Lora | None = None  # of params["lora"]
    tied: bool = True  # logits from the embedding table, no separate head
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    attention: Implementation = "auto"
    fused: bool = False  # queries, keys and values in one matrix, gate and up in another: `fuse`, for decoding
    exact: bool = False  # a token's numbers are the same bits decoded or scored, alone or in any batch
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again

    def __post_init__(self):
        for name in ("ropes", "windows"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.layers} layers")
        if self.exact and self.experts is not None:
            raise ValueError("exact: the products of experts depend on how many tokens each gets; legal: no experts")
        if self.exact and self.head_dim % LANE:
            raise ValueError(f"exact: head_dim is {self.head_dim}; legal: multiples of {LANE}")

    def rope(self, layer: int) -> Rope | None:
        return self.ropes[layer] if self.ropes else rope.default(10_000.0, self.head_dim)

    def tables(self) -> list[Rope]:
        """Those of the layers, each once."""
        return [table for table in dict.fromkeys(map(self.rope, range(self.layers))) if table is not None]

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_mixture(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers


# ------------------------------------------------------------------------------------------------------------- layers


def _param(rngs: nnx.Rngs, shape, axes, fan_in) -> nnx.Param:
    """A normal matrix of standard deviation 1/√fan_in, with logical axis names for the sharding rules."""
    value = jax.random.normal(rngs.params(), shape) * fan_in**-0.5
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _vector(value: float, shape, axes) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), out_sharding=axes, eager_sharding=False)


def _bias(present: bool, shape, axes) -> nnx.Param | None:
    return _vector(0.0, shape, axes) if present else None


def project(x, weight, bias=None, inputs: int = 1, exact: bool = False):
    """x · W + b over x's last `inputs` axes, which are W's first, as one two-dimensional matmul in x's dtype.

    exact: of at least ROWS rows, from where on XLA's CPU kernels add up a row's products in one order.

    Measured on CPU: the gradient of [512 9 128] x [128 352] takes half the time of the same product on three axes.
    """
    kept, inner, outer = x.shape[: x.ndim - inputs], weight.shape[:inputs], weight.shape[inputs:]
    flat = at_least(x.reshape(math.prod(kept), math.prod(inner)), ROWS if exact else 1)
    if isinstance(weight, Adapted):
        out = weight.apply(flat, inputs)
    else:
        out = flat @ weight.astype(x.dtype).reshape(math.prod(inner), math.prod(outer))
    out = out[: math.prod(kept)].reshape(*kept, *outer)
    return out if bias is None else out + bias.astype(x.dtype).reshape((1,) * len(kept) + outer)


class RMSNorm(nnx.Module):
    """x / rms(x) · (scale + offset) over x's last axes, as many as the scale has; computed in float32."""

    def __init__(self, config: DecoderConfig, shape: tuple[int, ...], axes: tuple = (None,)):
        self.scale = _vector(1.0 - config.norm_offset, shape, axes)
        self.epsilon, self.offset, self.exact = config.norm_epsilon, config.norm_offset, config.exact

    def __call__(self, x):
        x32, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32) + self.offset
        over = tuple(range(-scale.ndim, 0))
        if self.exact:
            squares = (x32**2).reshape(*x.shape[: -scale.ndim], scale.size)
            mean = jnp.expand_dims(tree_sum(squares) / scale.size, over)
        else:
            mean = (x32**2).mean(axis=over, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean + self.epsilon)
        return (normed * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        D, H, KV, K = config.width, config.heads, config.kv_heads, config.head_dim
        if config.fused:
            self.fused = _param(rngs, (D, KV, H // KV + 2, K), ("embed", "kv_heads", None, None), D)
            self.fused_bias = _bias(config.qkv_bias, (KV, H // KV + 2, K), ("kv_heads", None, None))
        else:
            self.query = _param(rngs, (D, H, K), ("embed", "heads", None), D)
            self.key = _param(rngs, (D, KV, K), ("embed", "kv_heads", None), D)
            self.value = _param(rngs, (D, KV, K), ("embed", "kv_heads", None), D)
            self.query_bias = _bias(config.qkv_bias, (H, K), ("heads", None))
            self.key_bias = _bias(config.qkv_bias, (KV, K), ("kv_heads", None))
            self.value_bias = _bias(config.qkv_bias, (KV, K), ("kv_heads", None))
        self.out = _param(rngs, (H, K, D), ("heads", None, "embed"), H * K)
        self.out_bias = _bias(config.out_bias, (D,), (None,))
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = RMSNorm(config, (K,)), RMSNorm(config, (K,))
        elif config.qk_norm == "whole":
            self.query_norm = RMSNorm(config, (H, K), ("heads", None))
            self.key_norm = RMSNorm(config, (KV, K), ("kv_heads", None))
        table, self.window = config.rope(layer), config.window(layer)
        self.config, self.table = config, None if table is None else config.tables().index(table)

    def __call__(self, x, sight: Sight, turns, cache, where):
        c = self.config
        query, key, value = self.projections(x)
        if c.qk_norm != "none":
            query, key = self.query_norm(query), self.key_norm(key)
        if self.table is not None:
            query, key = (rope.rotate(x, turns[self.table]) for x in (query, key))
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        if cache is None:
            seen = attend(query, key, value, sight, scale, self.window, c.attention_softcap, c.attention, c.exact)
        else:
            shared, own = cache
            cache = caches.append(own, key, value, where)
            keys = [(part["key"], part["value"]) for part in (shared, cache) if part is not None]
            seen = look_up(query, keys, sight, scale, self.window, c.attention_softcap, c.exact)
        return project(seen, _value(self.out), _value(self.out_bias), 2, c.exact), cache

    def projections(self, x):
        """Queries [B T H K], keys and values [B T KV K]."""
        if not self.config.fused:
            names = ("query", "key", "value")
            pairs = [(_value(getattr(self, name)), _value(getattr(self, f"{name}_bias"))) for name in names]
            return [project(x, weight, bias, exact=self.config.exact) for weight, bias in pairs]
        out = project(x, _value(self.fused), _value(self.fused_bias), exact=self.config.exact)
        query = out[..., :-2, :]
        return query.reshape(*x.shape[:-1], self.config.heads, -1), out[..., -2, :], out[..., -1, :]


def _value(param: nnx.Param | None):
    """What the parameter holds: an array, or an Adapted one, which `param[...]` would index."""
    return None if param is None else param.get_value()


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        if config.fused:
            self.fused = _param(rngs, (D, 2, F), ("embed", None, "mlp"), D)
            self.fused_bias = _bias(config.mlp_bias, (2, F), (None, "mlp"))
        else:
            self.gate = _param(rngs, (D, F), ("embed", "mlp"), D)
            self.up = _param(rngs, (D, F), ("embed", "mlp"), D)
            self.gate_bias = _bias(config.mlp_bias, (F,), ("mlp",))
            self.up_bias = _bias(config.mlp_bias, (F,), ("mlp",))
        self.down = _param(rngs, (F, D), ("mlp", "embed"), F)
        self.down_bias = _bias(config.mlp_bias, (D,), (None,))
        self.activation, self.fuses, self.exact = config.activation, config.fused, config.exact

    def __call__(self, x, routing=None):
        if self.fuses:
            both = project(x, _value(self.fused), _value(self.fused_bias), exact=self.exact)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate = project(x, _value(self.gate), _value(self.gate_bias), exact=self.exact)
            up = project(x, _value(self.up), _value(self.up_bias), exact=self.exact)
        inner = ACTIVATIONS[self.activation](gate) * up
        return project(inner, _value(self.down), _value(self.down_bias), exact=self.exact), None


class Mixture(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, E, F = config.width, config.experts.count, config.experts.width
        self.router = _param(rngs, (D, E), ("embed", None), D)
        self.gate = _param(rngs, (E, D, F), (None, "embed", "mlp"), D)
        self.up = _param(rngs, (E, D, F), (None, "embed", "mlp"), D)
        self.down = _param(rngs, (E, F, D), (None, "mlp", "embed"), F)
        self.config = config

    def __call__(self, x, routing=None):
        """Through the experts of `routing` [B T k], or of the router's own choice; returns the choice too."""
        B, T, D = x.shape
        flat, replayed = x.reshape(B * T, D), None if routing is None else routing.reshape(B * T, -1)
        chosen, weights = route(flat @ self.router[...].astype(x.dtype), self.config.experts, replayed)
        tables = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        out = mix(flat, chosen, weights, *tables, ACTIVATIONS[self.config.activation])
        return out.reshape(x.shape), chosen.reshape(B, T, -1)


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs):
        if config.norms in ("before", "both"):
            self.attention_norm, self.mlp_norm = (RMSNorm(config, (config.width,)) for _ in range(2))
        if config.norms in ("after", "both"):
            self.attention_post_norm, self.mlp_post_norm = (RMSNorm(config, (config.width,)) for _ in range(2))
        self.attention = Attention(config, layer, rngs)
        self.mlp = Mixture(config, rngs) if config.is_mixture(layer) else MLP(config, rngs)
        self.norms = config.norms

    def __call__(self, x, sight: Sight, turns, cache, where, routing):
        before, after = self.norms != "after", self.norms != "before"
        change, cache = self.attention(self.attention_norm(x) if before else x, sight, turns, cache, where)
        x = x + (self.attention_post_norm(change) if after else change)
        change, chosen = self.mlp(self.mlp_norm(x) if before else x, routing)
        return x + (self.mlp_post_norm(change) if after else change), cache, chosen


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, V = config.width, config.vocabulary
        # Tables are split along the vocabulary only: a table split along both axes makes XLA gather it whole at each
        # use.
        self.embedding = _param(rngs, (V, D), ("vocabulary", None), D)
        self.layers = nnx.List([Block(config, i, rngs) for i in range(config.layers)])
        self.norm = RMSNorm(config, (D,))
        if not config.tied:
            self.head = _param(rngs, (D, V), (None, "vocabulary"), D)
        self.config = config

    def __call__(self, tokens, positions, segments, cache, routing):
        config = self.config
        cache, sight, where = caches.see(positions, segments, cache)
        layers = [None] * config.layers if cache is None else caches.by_layer(cache)
        x = self.embedding[...][tokens].astype(config.dtype)
        x = x if config.embedding_scale == 1.0 else x * jnp.asarray(config.embedding_scale, x.dtype)
        turns = [rope.turns(positions, table) for table in config.tables()]
        kept, record, mixtures = [], [], config.experts.layers if config.experts else ()
        for i, block in enumerate(self.layers):
            run = _rematerialised(block, config.remat if cache is None else "none")
            replayed = routing[:, :, mixtures.index(i)] if routing is not None and i in mixtures else None
            x, layer_cache, chosen = run(x, sight, turns, layers[i], where, replayed)
            kept.append(layer_cache)
            record += [] if chosen is None else [chosen]
        if cache is not None:
            cache = {**cache, "layers": kept}
            if record:
                cache["routing"] = caches.write(cache["routing"], jnp.stack(record, axis=2), where)
        return self.norm(x), cache

    def logits(self, hidden):
        """Float32: a sum of bfloat16 products is kept as it is."""
        table = self.embedding[...].T if self.config.tied else self.head[...]
        flat = hidden.reshape(-1, hidden.shape[-1])
        padded = at_least(flat, ROWS if self.config.exact else 1)
        z = jnp.matmul(padded, table.astype(hidden.dtype), preferred_element_type=jnp.float32)[: len(flat)]
        cap = self.config.logit_softcap
        z = z if cap is None else cap * jnp.tanh(z / cap)
        return z.reshape(*hidden.shape[:-1], -1)


def _rematerialised(block, remat: str):
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(lambda *args: block(*args), policy=policy)


# ---------------------------------------------------------------------------------------------------- pure functions


@lru_cache
def _definition(config: DecoderConfig):
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return nnx.split(abstract, nnx.Param)


def init(config: DecoderConfig, key) -> Params:
    """Random parameters. Layers are keyed by integers: nnx orders its children by key, and "10" < "2"."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))


def abstract(config: DecoderConfig) -> Params:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return nnx.to_pure_dict(_definition(config)[1])


def logical_axes(config: DecoderConfig) -> Params:
    """A tuple of logical axis names per parameter, for the sharding rules of `train.mesh`."""
    specs = nnx.to_pure_dict(nnx.get_partition_spec(_definition(config)[1]))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def init_cache(config: DecoderConfig, rows: int, length: int) -> caches.Cache:
    """An empty cache for `rows` rows of up to `length` tokens."""
    e = config.experts
    routing = None if e is None else (len(e.layers), e.chosen, e.dtype)
    return caches.init(config.layers, rows, length, config.kv_heads, config.head_dim, config.dtype, routing)


def forward(config: DecoderConfig, params: Params, tokens, positions, segments, cache=None, routing=None):
    """Hidden states [B T D] after the last norm, and the cache with the new columns.

    Without a cache the keys are the tokens themselves; with one they are its columns, and the new tokens are appended
    at each row's own length. `routing` [B T M k]: the experts to take in each of the M mixture layers.
    """
    return nnx.merge(_definition(config)[0], params)(tokens, positions, segments, cache, routing)


def logits(config: DecoderConfig, params: Params, hidden):
    """[.. D] -> [.. V]."""
    return nnx.merge(_definition(config)[0], params).logits(hidden)


def whole(config: DecoderConfig, params: Params, frozen: Params) -> Params:
    """Everything the model needs: frozen["base"], the trained `params` laid over it, params["lora"] attached.

    So a part that is not trained stands in frozen["base"], and {} as parameters is the base itself: the reference of an
    adapter needs no copy.
    """
    tree = dict(_overlay(on_device(frozen["base"]), params) if "base" in frozen else params)
    if "lora" not in tree:
        return tree
    if config.adapter is None:
        raise ValueError("the parameters hold an adapter ('lora'), the config does not say which (adapter=Lora(...))")
    adapter = tree.pop("lora")
    return tree | {"decoder": attach(config.adapter, tree["decoder"], adapter)}


def on_device(frozen: Params) -> Params:
    """Inside a compiled function, parameters that may have waited in the host's memory.

    For those alone: what is computed from them counts as committed to its device.
    """
    return jax.device_put(frozen, jax.memory.Space.Device)


def _overlay(below: Params, above: Params) -> Params:
    out = dict(below)
    for name, value in above.items():
        inner = below.get(name)
        out[name] = _overlay(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def fuse(config: DecoderConfig, params: Params) -> Params:
    """The parameters as a config with `fused` has them: fewer and larger matmuls, of which decoding is made."""

    def joined(attention: Params) -> Params:
        heads = lambda x: x.reshape(*x.shape[:-2], config.kv_heads, -1, config.head_dim)  # noqa: E731
        kept = {name: x for name, x in attention.items() if name.partition("_bias")[0] not in ("query", "key", "value")}
        for end in ("", "_bias") if config.qkv_bias else ("",):
            parts = [heads(attention[name + end]) for name in ("query", "key", "value")]
            kept["fused" + end] = jnp.concatenate(parts, axis=-2)
        return kept

    def paired(mlp: Params) -> Params:
        kept = {name: x for name, x in mlp.items() if name.partition("_bias")[0] not in ("gate", "up")}
        for end in ("", "_bias") if config.mlp_bias else ("",):
            kept["fused" + end] = jnp.stack([mlp["gate" + end], mlp["up" + end]], axis=-2)
        return kept

    def block(i: int, layer: Params) -> Params:
        mlp = layer["mlp"] if config.is_mixture(i) else paired(layer["mlp"])
        return layer | {"attention": joined(layer["attention"]), "mlp": mlp}

    return params | {"layers": {i: block(i, layer) for i, layer in params["layers"].items()}}


@lru_cache
def language_model(config: DecoderConfig) -> LM:
    """The decoder as a sampler sees it. Its parameters are those that `whole` takes.

    On one device, and without an adapter, `prepare` fuses matrices: on a mesh that would move them. Not where numbers
    are to be exact: in a matrix of other columns some are computed by another kernel.
    """
    fused = dataclasses.replace(config, fused=jax.device_count() == 1 and config.adapter is None and not config.exact)

    def prepare(params: Params, frozen: Params) -> tuple[Params, Params]:
        params = whole(config, params, frozen)["decoder"]
        return fuse(config, params) if fused.fused else params, {}

    return LM(
        init_cache=partial(init_cache, config),
        forward=lambda params, _, *args: forward(fused, params, *args),
        logits=lambda params, _, hidden: logits(fused, params, hidden),
        gather=caches.gather,
        scatter=caches.scatter,
        fork=caches.copies if config.exact else caches.fork,
        grow=caches.grow,
        prepare=prepare,
        routing=None if config.experts is None else caches.routing,
    )
