"""How parameters are stored in a Hugging Face directory: tensor names, rows, and which axes are which.

A matrix is stored [out, in] and held here as [in, out], either of which may be several axes (heads and their
dimensions). Vectors and the embedding table are held as they are stored. Layers and experts are stored one by one;
experts, and with `scan_layers` layers, are held as one array. Phi-3 stores projections of the same input as one tensor,
concatenated along the rows.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import INPUT_AXES
from rljax.models.stacks import layers_of

VECTORS = ("scale", "query_bias", "key_bias", "value_bias", "out_bias", "gate_bias", "up_bias", "down_bias")
NOT_TRANSPOSED = (*VECTORS, "embedding")


class TensorSlice(NamedTuple):
    """Rows of a stored tensor that are a parameter of ours, or a part of one."""

    name: str  # of the stored tensor
    start: int  # first row
    rows: int
    columns: int | None  # None: a vector


def tensor_slices(config: DecoderConfig, fused: bool = False) -> dict[tuple, list[TensorSlice]]:
    """Where each parameter is stored: path -> its slices: one, or in order those of all stacked layers and experts.

    Args:
      fused: with the fused projections of Phi-3.
    """
    out = {}
    for jax_path, leaf in jax.tree.leaves_with_path(decoder.abstract(config)):
        path = path_keys(jax_path)
        shape = leaf.shape[num_stacked_axes(path, leaf.shape) :]
        if path[-1] in VECTORS:
            rows, columns = math.prod(shape), None
        elif path[-1] in NOT_TRANSPOSED:
            rows, columns = shape
        else:
            inputs = num_input_axes(path)
            rows, columns = math.prod(shape[inputs:]), math.prod(shape[:inputs])
        out[path] = [TensorSlice(name, 0, rows, columns) for name in _stored_names(config, path)]
    return _fuse(out) if fused else out


def tensor_shapes(slices: Iterable[TensorSlice]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors, given all of their slices."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in slices:
        rows = piece.start + piece.rows
        if piece.name in shapes:
            rows = max(rows, shapes[piece.name][0])
        shapes[piece.name] = (rows,) if piece.columns is None else (rows, piece.columns)
    return shapes


def path_keys(path) -> tuple:
    """The keys of a path as jax gives it."""
    return tuple(key.key for key in path)


def num_stacked_axes(path: tuple, shape: tuple[int, ...]) -> int:
    """How many leading axes of the parameter are layers, or experts, which are stored one by one."""
    layers = layers_of(path) is not None
    experts = path[-2:-1] == ("mlp",) and len(shape) - layers == 3
    return layers + experts


def num_input_axes(path: tuple) -> int:
    """How many of the parameter's leading axes are the matrix's input."""
    return INPUT_AXES.get(path[-1], 1)


NORM_NAMES = {  # by DecoderConfig.norms
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
OUTER_NAMES = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def _stored_names(config: DecoderConfig, path: tuple) -> list[str]:
    """Names of the stored tensors that hold this parameter."""
    if path[0] != "layers":
        return [OUTER_NAMES[path[0]]]
    layers = layers_of(path)
    if layers is not None:
        return [name for layer in layers for name in _stored_names(config, ("layers", layer, *path[2:]))]
    _, layer, block, name, *_ = path
    prefix = f"model.layers.{layer}."
    norms = NORM_NAMES[config.norms]
    kind = "bias" if name.endswith("_bias") else "weight"
    if block in norms:
        return [f"{prefix}{norms[block]}.weight"]
    if block == "attention":
        suffix = "_norm.weight" if name in ("query_norm", "key_norm") else f"_proj.{kind}"
        return [f"{prefix}self_attn.{name[0]}{suffix}"]  # q, k, v or o
    if name == "router":
        return [f"{prefix}mlp.gate.weight"]
    if config.is_moe_layer(layer):
        return [f"{prefix}mlp.experts.{e}.{name}_proj.weight" for e in range(config.moe.num_experts)]
    return [f"{prefix}mlp.{name.removesuffix('_bias')}_proj.{kind}"]


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
FUSED_OF = {module: fused for fused, modules in FUSED.items() for module in modules}


def _fuse(separate: dict[tuple, list[TensorSlice]]) -> dict[tuple, list[TensorSlice]]:
    """The slices where projections of the same input are stored as one tensor."""
    rows = {piece.name: piece.rows for found in separate.values() for piece in found}

    def fuse_piece(piece: TensorSlice) -> TensorSlice:
        *prefix, module, kind = piece.name.split(".")
        fused = FUSED_OF.get(module)
        if fused is None:
            return piece
        modules = FUSED[fused]
        above = [".".join([*prefix, other, kind]) for other in modules[: modules.index(module)]]
        start = sum(rows[name] for name in above)
        return piece._replace(name=".".join([*prefix, fused, kind]), start=start)

    return {path: [fuse_piece(piece) for piece in found] for path, found in separate.items()}


@contextlib.contextmanager
def atomic_directory(directory: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory to write into, renamed to `directory` at the end: it is never there half written.

    Raises ValueError if `directory` exists and is not empty, unless it is to be replaced.
    """
    directory = Path(directory)
    if not replace and directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name a directory that does not exist yet")
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if directory.exists():
        shutil.rmtree(directory)
    os.rename(unfinished, directory)


def preview(names: Iterable[str]) -> str:
    """At most four of the names, for an error message."""
    names = sorted(names)
    if not names:
        return "none"
    listed = ", ".join(names[:4])
    return f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed
