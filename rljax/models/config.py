"""The shape of a decoder. Where Hugging Face's config.json has a word for a field, it is the name here."""

import dataclasses
from typing import Literal

import jax
from jax.sharding import NamedSharding

from rljax.models import rope
from rljax.models.attention import Implementation
from rljax.models.batch_invariant import LANE
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig
from rljax.models.rope import Rope
from rljax.models.stacks import find_scans


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """With the fields before the first default alone, a decoder is a Llama: grouped-query attention, rotary positions,
    RMSNorm before each block, SwiGLU. The other fields are what other families do differently."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP
    max_positions: int = 2048  # the context length
    ropes: tuple[Rope | None, ...] = ()  # one for each layer, None: no positions; (): θ = 10,000 in all layers
    windows: tuple[int | None, ...] = ()  # sliding window of each layer in positions, the query's included; (): none
    rms_norm_eps: float = 1e-5
    norms: Literal["pre", "post", "both"] = "pre"  # normalize a block's input, its output, or both
    norm_offset: float = 0.0  # added to the scale of a norm (Gemma: 1)
    qk_norm: Literal["none", "head", "full"] = "none"  # of queries and keys: each head, or before the split into heads
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0  # multiplies the embeddings (Gemma: √hidden_size)
    attention_scale: float | None = None  # of scores; None: head_dim^-½
    attention_softcap: float | None = None  # c in c tanh(score/c)
    logit_softcap: float | None = None
    moe: MoEConfig | None = None  # mixture-of-experts layers
    adapter: LoraConfig | None = None  # of params["lora"]
    tie_word_embeddings: bool = True  # logits from the embedding table, no separate head
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    attn_implementation: Implementation = "auto"
    fused_projections: bool = False  # queries, keys and values in one matrix, gate and up in another, for decoding
    batch_invariant: bool = False  # a token's numbers have the same bits decoded or scored, alone or in any batch (CPU)
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    scan_layers: bool = (
        False  # parameters and cache of like layers stacked: deep decoders compile as fast as short ones
    )
    hidden_sharding: NamedSharding | None = None  # of hidden states [B T D] between layers; None: XLA chooses
    gather_for_generation: bool = False  # on a mesh: the sampler's weights are gathered over fsdp once a rollout

    def __post_init__(self):
        for name in ("ropes", "windows"):
            entries = len(getattr(self, name))
            if entries not in (0, self.num_layers):
                raise ValueError(f"{name} has {entries} entries for {self.num_layers} layers")
        if self.batch_invariant and self.moe is not None:
            raise ValueError(
                "batch_invariant: the matmuls of experts depend on how many tokens each gets; legal: no experts"
            )
        if self.batch_invariant and self.head_dim % LANE:
            raise ValueError(f"batch_invariant: head_dim is {self.head_dim}; legal: multiples of {LANE}")
        if self.batch_invariant and self.scan_layers:
            raise ValueError("batch_invariant: equal bits are tested with unrolled layers; legal: without scan_layers")

    @property
    def backend(self) -> str:
        """The platform that the decoder runs on: that of the mesh, which may be of a pod that is not there."""
        if self.hidden_sharding is None:
            return jax.default_backend()
        return self.hidden_sharding.mesh.devices.flat[0].platform

    @property
    def num_devices(self) -> int:
        return jax.device_count() if self.hidden_sharding is None else self.hidden_sharding.mesh.size

    def rope(self, layer: int) -> Rope | None:
        return self.ropes[layer] if self.ropes else rope.default(10_000.0, self.head_dim)

    def rope_tables(self) -> list[Rope]:
        """The tables of all layers, each once."""
        distinct = dict.fromkeys(self.rope(layer) for layer in range(self.num_layers))
        return [table for table in distinct if table is not None]

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def layer_scans(self) -> tuple[tuple[range, ...], ...]:
        """The scans of a decoder with `scan_layers`, as `models.stacks.find_scans` gives them."""
        kinds = [(self.rope(i), self.window(i), self.is_moe_layer(i)) for i in range(self.num_layers)]
        return find_scans(kinds)

    def layer_stacks(self) -> list[range]:
        """The layers of each stack of a decoder with `scan_layers`."""
        return [layers for scan in self.layer_scans() for layers in scan]
