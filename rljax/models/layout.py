"""Where each of our parameters stands in a Hugging Face directory: names, rows, and which axes are which.

A matrix is stored [out, in] and held [in, out], either side of which may be several axes (heads and their dimensions).
Vectors and the table of embeddings are held as they are stored. Experts are stored one by one and held as one array;
Phi-3 stores projections of the same input as one tensor, below each other.
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
from rljax.models.lora import INPUTS

VECTORS = ("scale", "query_bias", "key_bias", "value_bias", "out_bias", "gate_bias", "up_bias", "down_bias")
KEPT = (*VECTORS, "embedding")  # stored as they are; matrices are [out, in] there and [in, out] here


class Piece(NamedTuple):
    """Rows of a stored tensor that are (a part of) one of our parameters."""

    name: str  # of the stored tensor
    start: int  # first row
    rows: int
    columns: int | None  # None: a vector


def pieces(config: DecoderConfig, fused: bool = False) -> dict[tuple, list[Piece]]:
    """Where each parameter stands: path -> one piece, or one for each expert. fused: as Phi-3 stores them."""
    shapes = {keys(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(decoder.abstract(config))}
    out = {}
    for path, shape in shapes.items():
        names = _names(config, path)
        matrix = shape[1:] if is_stacked(path, shape) else shape
        if path[-1] in VECTORS:
            rows, columns = math.prod(matrix), None
        elif path[-1] in KEPT:
            rows, columns = matrix
        else:
            inputs = inputs_of(path)
            rows, columns = math.prod(matrix[inputs:]), math.prod(matrix[:inputs])
        out[path] = [Piece(name, 0, rows, columns) for name in names]
    return _fuse(out) if fused else out


def shapes_of(found: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors that these are all the pieces of."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in found:
        rows = max(piece.start + piece.rows, *shapes.get(piece.name, (0,))[:1])
        shapes[piece.name] = (rows,) if piece.columns is None else (rows, piece.columns)
    return shapes


def keys(path) -> tuple:
    """A path of jax's as the names in it."""
    return tuple(key.key for key in path)


def is_stacked(path: tuple, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is all experts' matrices: one piece each."""
    return path[-2:-1] == ("mlp",) and len(shape) == 3


def inputs_of(path: tuple) -> int:
    """Leading axes of ours that are the matrix's input."""
    return INPUTS.get(path[-1], 1)


def _names(config: DecoderConfig, path: tuple) -> list[str]:
    """Names of the stored tensors that hold this parameter."""
    if path[0] != "layers":
        outer = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
        return [outer[path[0]]]
    _, i, block, name, *_ = path
    inside = f"model.layers.{i}."
    norms = {
        "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "after": {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        "both": {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
    }[config.norms]
    if block in norms:
        return [f"{inside}{norms[block]}.weight"]
    if block == "attention":
        if name in ("query_norm", "key_norm"):
            return [f"{inside}self_attn.{name[0]}_norm.weight"]
        return [f"{inside}self_attn.{name[0]}_proj.{'bias' if name.endswith('_bias') else 'weight'}"]
    if name == "router":
        return [f"{inside}mlp.gate.weight"]
    if config.is_mixture(i):
        return [f"{inside}mlp.experts.{e}.{name}_proj.weight" for e in range(config.experts.count)]
    kind = "bias" if name.endswith("_bias") else "weight"
    return [f"{inside}mlp.{name.removesuffix('_bias')}_proj.{kind}"]


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def _fuse(apart: dict[tuple, list[Piece]]) -> dict[tuple, list[Piece]]:
    """Projections that are stored as one tensor, below each other."""
    rows = {piece.name: piece.rows for (piece, *_) in apart.values()}
    whole_of = {part: (whole, parts) for whole, parts in FUSED.items() for part in parts}
    out = {}
    for path, (piece, *_) in apart.items():
        *before, part, kind = piece.name.split(".")
        whole, parts = whole_of.get(part, (part, (part,)))
        above = [".".join([*before, p, kind]) for p in parts[: parts.index(part)]]
        out[path] = [piece._replace(name=".".join([*before, whole, kind]), start=sum(rows[name] for name in above))]
    return out


@contextlib.contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` at the end: there is never half of it.

    Raises ValueError where `directory` already holds something.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; name a directory that does not exist yet")
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if directory.exists():
        directory.rmdir()
    os.rename(unfinished, directory)


def some(names: Iterable[str]) -> str:
    """At most four of the names, for an error."""
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") if shown else "none"
