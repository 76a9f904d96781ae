"""The tensors that a model directory stores: which file holds each, and whether two of them are equal."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rljax.models.layout import preview

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
ROWS = 4096  # of a table that are compared at a time


def stored_files(directory: Path) -> dict[str, Path]:
    """Name of each stored tensor -> the file that holds it.

    Files are those of the index if there is one, else model.safetensors, else all of *.safetensors.
    """
    index = directory / INDEX
    single = directory / "model.safetensors"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        absent = {file.name for file in files if not file.is_file()}
        if absent:
            raise FileNotFoundError(f"{directory}: its index names {preview(absent)}, which are missing")
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}; pickled weights (.bin, .pt) are not read")
    file_of = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                file_of |= {name: file for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from None
    return file_of


def holds_tensors(directory: Path) -> bool:
    """Whether there is any safetensors file."""
    return any(directory.glob("*.safetensors"))


def are_equal(files: dict[str, Path], name: str, other: str) -> bool:
    """Whether two stored tables [V D] have the same shape and the same values; read a few rows at a time."""
    with safe_open(files[name], framework="numpy") as opened, safe_open(files[other], framework="numpy") as also:
        one = opened.get_slice(name)
        two = also.get_slice(other)
        if one.get_shape() != two.get_shape():
            return False
        count = one.get_shape()[0]
        blocks = [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
        return all(np.array_equal(one[rows], two[rows]) for rows in blocks)
