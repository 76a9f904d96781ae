"""The tensors that a model directory stores: which file holds each, and whether two of them are equal."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rljax.models.layout import preview

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
ROWS = 4096  # of a table that are compared at a time


def stored_files(directory: Path) -> dict[str, Path]:
    """Name of each stored tensor -> the file that holds it.

    Files are those of the index if there is one, else model.safetensors, else all of *.safetensors.
    """
    index = directory / INDEX
    single = directory / "model.safetensors"
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{index} has no weight_map, which names the file of each tensor; copy or download it again"
            )
        files = [directory / name for name in sorted(set(weight_map.values()))]
        absent = {file.name for file in files if not file.is_file()}
        if absent:
            raise FileNotFoundError(f"{directory}: its index names {preview(absent)}, which are missing")
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}; pickled weights (.bin, .pt) are not read")
    file_of = {}
    for file in files:
        _refuse_lfs_pointer(file)
        try:
            with safe_open(file, framework="numpy") as opened:
                file_of |= {name: file for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from None
    return file_of


def read_object(file: Path) -> dict:
    """The object in a JSON file of a model directory.

    Raises ValueError, saying what is wrong and what to do, for a Git LFS pointer and a file that is empty or cut short.
    """
    _refuse_lfs_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        wrong = "is empty" if not file.stat().st_size else f"is not JSON ({error}): cut short?"
        raise ValueError(f"{file} {wrong}; copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; legal: an object")
    return content


def _refuse_lfs_pointer(file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself; get it with: git lfs pull")


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
