"""What a run reads: a digest of each file, by which a run that goes on notices that one is no longer what it was."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

BLOCK_BYTES = 1 << 16
BLOCKS = 64  # that are read of a large file of a model
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def file_digests(paths: Iterable[str | Path]) -> dict[str, str]:
    """Path -> digest of each file; of a directory, which is that of a model, of each file in it.

    A file is read whole. Of a model's file longer than `BLOCKS` blocks so many blocks are read, evenly spread from its
    beginning to its end, and its size: training changes a model everywhere, and to read 15 GB would take half a minute.
    """
    digests = {}
    for path in map(Path, paths):
        if path.is_dir():
            parts = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in MODEL_FILES)
            digests |= {str(file): _digest(file, BLOCKS) for file in parts}
        else:
            digests[str(path)] = _digest(path)
    return digests


def describe_changed_inputs(where: str | Path, before: Mapping[str, str], now: Mapping[str, str], option: str) -> str:
    """One line that names a file whose digest is another, that is new or that is gone; "" where there is none.

    Args: where: what was begun with the digests `before`. option: of the command line, which would name another.
    """
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not changed:
        return ""
    more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
    return f"{changed[0]} has changed since {where} was begun{more}: name another {option}, or put back what it was"


def _digest(file: Path, blocks: int | None = None) -> str:
    digest = hashlib.sha256(f"{file.stat().st_size} bytes\n".encode())
    for block in _read(file, blocks):
        digest.update(block)
    return digest.hexdigest()[:32]


def _read(file: Path, blocks: int | None) -> Iterator[bytes]:
    """All of a file in blocks, or so many of them."""
    spare = file.stat().st_size - BLOCK_BYTES  # the last block begins there
    with file.open("rb") as source:
        if blocks is None or spare < blocks * BLOCK_BYTES:
            while block := source.read(BLOCK_BYTES):
                yield block
            return
        for number in range(blocks):
            source.seek(spare * number // (blocks - 1))
            yield source.read(BLOCK_BYTES)
