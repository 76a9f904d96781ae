"""What a step of grpo.py costs on a pod, by formulas: operations, bytes moved and sent. `device_memory.py`: bytes held.

Operations are those of the matrix products and of attention (a fused multiply-add is two). What a device reads and
writes is its weights, its cache and its activations, each as often as a pass needs them at least. Compiling is not
needed; where a program is compiled, the compiler's own figures replace those for collectives
(`experiments/preflight.py`).
"""

import math
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common.activations import SINGLE, expert_shards
from experiments.common.chips import Topology
from experiments.common.micro_batches import Pieces
from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import RULES

PASSES = {"none": 3, "dots": 3, "full": 4}  # forward passes that an update costs: forward, two backward, recomputed


class Sent(NamedTuple):
    """Bytes that each device sends in a phase, for one reason."""

    what: str
    kind: str  # of the collective
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group lie
    bytes: float


class Phase(NamedTuple):
    """A part of a step, on one device."""

    name: str
    flops: float
    hbm_bytes: float
    sent: tuple[Sent, ...]
    seconds: dict[str, float]  # of compute, HBM and interconnect, each at its published peak


class Sizes(NamedTuple):
    """How much a step samples and learns from."""

    prompts: int
    num_generations: int
    prompt_tokens: int
    max_tokens: int
    pieces: Pieces  # of the update
    scored: int  # forward passes of scoring: by the reference, and by the policy where old log-probs are needed
    updates: int  # optimizer updates of a step
    epochs: int

    @property
    def rows(self) -> int:
        return self.prompts * self.num_generations


# --------------------------------------------------------------------------------------------------------------- time


@lru_cache
def num_params(config: DecoderConfig) -> int:
    """Of the decoder."""
    return _count(decoder.abstract(config))


@lru_cache
def num_layer_params(config: DecoderConfig) -> int:
    """Of the decoder's layers: without embedding, head and last norm."""
    return _count(decoder.abstract(config)["layers"])


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def token_weights(config: DecoderConfig, grouped: bool = True) -> float:
    """Weights that a token is multiplied by in the layers: of a mixture those of its experts alone.

    grouped: False: a token's row for each of its experts is multiplied by all experts (`models.moe.moe_mlp`).
    """
    layers = num_layer_params(config)
    if config.moe is None:
        return layers
    moe = config.moe
    used = moe.num_experts_per_tok * (1 if grouped else moe.num_experts)
    return layers + len(moe.layers) * 3 * config.hidden_size * moe.intermediate_size * (used - moe.num_experts)


def forward_flops(config: DecoderConfig, tokens: float, pairs: float, logits: float, grouped: bool = True) -> float:
    """Of a forward pass over `tokens`, with `pairs` of query and key in each layer, and so many rows of logits."""
    attention = 4 * config.num_heads * config.head_dim * config.num_layers * pairs
    products = 2 * token_weights(config, grouped) * tokens
    return products + attention + 2 * config.vocab_size * config.hidden_size * logits


def seen_pairs(config: DecoderConfig, start: int, end: int) -> float:
    """Pairs of query and key of the tokens start .. end - 1 of a row, averaged over layers."""

    def of_layer(window: int | None) -> float:
        if window is None or window >= end:
            return (end * (end + 1) - start * (start + 1)) / 2
        growing = max(0, min(end, window) - start)
        below = sum(range(start + 1, start + growing + 1))
        return below + (end - start - growing) * window

    return sum(of_layer(config.window(i)) for i in range(config.num_layers)) / config.num_layers


def phases(config: DecoderConfig, topology: Topology, mesh: jax.sharding.Mesh, sizes: Sizes) -> list[Phase]:
    """Prefill, decoding, scoring and update of a step: what each device computes, moves and sends."""
    half = np.dtype(config.dtype).itemsize
    devices = mesh.size
    flops_of = partial(forward_flops, config, grouped=topology.is_tpu)
    P, B, L, N = sizes.prompts, sizes.rows, sizes.prompt_tokens, sizes.max_tokens
    weights = sum(params_of_device(config, mesh)) * half  # as a device computes with them
    layer_bytes = config.num_layers * config.hidden_size * half
    decode_pairs = seen_pairs(config, L, L + N)
    kv_of_pair = 2 * config.num_kv_heads * config.head_dim * half * config.num_layers / kv_shards(config, mesh)

    prompt_tokens = B / sizes.pieces.group_size * L
    learned = B * N + prompt_tokens
    learned_pairs = B * decode_pairs + B / sizes.pieces.group_size * seen_pairs(config, 0, L)
    learned_flops = flops_of(learned, learned_pairs, B * N)
    cut = sizes.updates // sizes.epochs * sizes.pieces.micro_batches  # all rows of a step, in so many pieces
    passes = PASSES[config.remat]
    local = devices / mesh.shape["tensor"]
    sampled = num_layer_params(config) / num_params(config)  # a sampler gathers no tables of the vocabulary
    gathers = 0 if config.gather_for_generation else N

    def phase(name: str, flops: float, hbm: float, sent: Iterable[Sent]) -> Phase:
        sent = tuple(one for one in sent if one.bytes > 0)
        of_device = flops / devices
        return Phase(name, of_device, hbm, sent, seconds(topology, mesh, config.dtype, of_device, hbm, sent))

    decode_hbm = N * weights + (B * decode_pairs * kv_of_pair + N * 4 * layer_bytes * B) / local
    return [
        phase(
            "prefill",
            flops_of(P * L, P * seen_pairs(config, 0, L), P),
            weights + 20 * layer_bytes * P * L / local,
            _sent(config, mesh, P * L, passes=1, gathers=sampled),
        ),
        phase(
            "decode",
            flops_of(B * N, B * decode_pairs, B * N),
            decode_hbm,
            _sent(config, mesh, B * N, passes=1, gathers=gathers * sampled, logits=B * N),
        ),
        phase(
            "scoring",
            sizes.scored * learned_flops,
            sizes.scored * (cut * weights + 20 * layer_bytes * learned / local),
            _sent(config, mesh, sizes.scored * learned, passes=1, gathers=sizes.scored * cut),
        ),
        phase(
            "update",
            sizes.epochs * passes * learned_flops,
            sizes.epochs * passes * (cut * weights + 20 * layer_bytes * learned / local)
            + sizes.updates * 7 * sum(params_of_device(config, mesh)) * SINGLE / mesh.shape["fsdp"],
            _sent(
                config,
                mesh,
                sizes.epochs * learned,
                passes=passes,
                gathers=sizes.epochs * cut * 2,
                reduces=sizes.epochs * cut,
            ),
        ),
    ]


def _sent(
    config: DecoderConfig,
    mesh: jax.sharding.Mesh,
    tokens: float,
    passes: int,
    gathers: float,
    reduces: float = 0,
    logits: float = 0,
) -> list[Sent]:
    """What each device sends: weights gathered, gradients reduced, activations reduced or exchanged.

    Each micro-batch sums its gradients over `fsdp` and over `data`, those of all but experts also over `expert`, which
    has rows too: their sum over micro-batches is held as parameters are. In a mixture each device collects the tokens
    of all along `expert`, and the sums that it has computed for them go back (`rljax.models.moe`): gathered forward,
    recomputed and backward, scattered forward and backward.
    """
    half = np.dtype(config.dtype).itemsize
    shape = mesh.shape
    tensor, fsdp, data, expert, sequence = (shape[a] for a in ("tensor", "fsdp", "data", "expert", "sequence"))
    experts, others = params_of_device(config, mesh)
    share = experts + others
    gathered = share * half * (fsdp - 1) / fsdp
    summed = share * SINGLE * (fsdp - 1) / fsdp
    on_device = tokens / math.prod(shape[a] for a in (*RULES["rows"], *RULES["columns"]))
    hidden = on_device * config.hidden_size * half
    mixtures = len(config.moe.layers) if config.moe else 0
    collected = expert_shards(config, mesh)  # times as many tokens go through the experts of a device
    summed_layers = 2 * config.num_layers + mixtures * (collected - 1)
    out = [
        Sent("weights", "all-gather", ("fsdp",), gathers * gathered),
        Sent("gradients", "reduce-scatter", ("fsdp",), reduces * summed),
        Sent("gradients", "all-reduce", ("data",), reduces * 2 * share / fsdp * SINGLE * (data - 1) / data),
        Sent("gradients", "all-reduce", ("expert",), reduces * 2 * others / fsdp * SINGLE * (expert - 1) / expert),
        Sent(
            "hidden states",
            "all-reduce",
            ("tensor",),
            passes * summed_layers * 2 * hidden * (tensor - 1) / tensor,
        ),
    ]
    if sequence > 1 and not logits:
        kv = 2 * config.num_kv_heads * config.head_dim / kv_shards(config, mesh) * half * tokens / data / fsdp / expert
        out.append(Sent("keys and values", "all-gather", ("sequence",), passes * config.num_layers * kv))
    gathered_passes, scattered_passes = (passes - 1, 2) if reduces else (passes, passes)
    of_pass = mixtures * (collected - 1) * hidden
    out.append(Sent("tokens of experts", "all-gather", ("expert",), gathered_passes * of_pass))
    out.append(Sent("tokens of experts", "reduce-scatter", ("expert",), scattered_passes * of_pass))
    if logits:
        moved = logits * config.hidden_size * half + logits * config.vocab_size * SINGLE / mesh.size
        out.append(Sent("logits", "all-to-all", ("fsdp", "tensor"), moved * (mesh.size > 1)))
    return out


def params_of_device(config: DecoderConfig, mesh: jax.sharding.Mesh) -> tuple[float, float]:
    """Parameters that a device computes with, gathered over `fsdp`: those of experts, and the others."""
    moe = config.moe
    experts = 3 * config.hidden_size * moe.intermediate_size * moe.num_experts * len(moe.layers) if moe else 0
    tensor = mesh.shape["tensor"]
    return experts / tensor / expert_shards(config, mesh), (num_params(config) - experts) / tensor


def kv_shards(config: DecoderConfig, mesh: jax.sharding.Mesh) -> int:
    """Parts that keys and values are split into over `tensor`; heads that it does not divide are copied to all."""
    return mesh.shape["tensor"] if config.num_kv_heads % mesh.shape["tensor"] == 0 else 1


def seconds(
    topology: Topology, mesh: jax.sharding.Mesh, dtype: str, flops: float, hbm_bytes: float, sent: Iterable[Sent]
) -> dict[str, float]:
    """Time of compute, HBM and interconnect at the chip's published peaks. The longest of them is the phase's bound."""
    places = places_of(topology, mesh)
    wire = 0.0
    for one in sent:
        group = group_along(mesh, one.axes)
        if len(group) > 1:
            wire += one.bytes / topology.bandwidth([places[i] for i in group])
    return {
        "compute": flops / topology.chip.peak_flops(dtype),
        "HBM": hbm_bytes / topology.chip.hbm_bandwidth,
        "interconnect": wire,
    }


def group_along(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Devices, as positions in the flattened mesh, of the first group along these axes."""
    ids = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    first = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return tuple(np.ravel(ids[first]).tolist())


def places_of(topology: Topology, mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    """Where each device of the flattened mesh is; of a pod without devices, its number row by row."""
    if isinstance(mesh, jax.sharding.Mesh) and topology.is_tpu and hasattr(mesh.devices.flat[0], "coords"):
        return [tuple(device.coords[: topology.chip.torus]) for device in mesh.devices.flat]
    return [tuple(np.unravel_index(i, topology.shape)) for i in range(mesh.size)]


def with_collectives(phase: Phase, topology: Topology, mesh: jax.sharding.Mesh, found: list, calls: int) -> Phase:
    """The phase whose interconnect is that of the compiled program's collectives."""
    places = places_of(topology, mesh)
    wire = sum(one.sent / topology.bandwidth([places[i] for i in one.group]) for one in found)
    return phase._replace(seconds=phase.seconds | {"interconnect": calls * wire})
