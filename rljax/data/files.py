"""Rows of a file: jsonl, a JSON array, either of them gzipped; parquet files and the hub through `datasets`."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB = "hf://"
LEGAL = "legal: .jsonl, .json (lines, or one array), either of them with .gz; .parquet; hf://OWNER/NAME[:SPLIT]"


class Table(NamedTuple):
    """The rows of a file, and where each stands."""

    path: str
    rows: list[dict[str, Any]]
    numbers: list[int]  # the line of each row, or which row it is, from 1
    unit: str = "line"  # what is counted: "line" or "row"

    def place(self, i: int, column: str | None = None) -> str:
        """Where row i stands, for an error: FILE, line 7, column 'prompt'."""
        place = f"{self.path}, {self.unit} {self.numbers[i]}"
        return place if column is None else f"{place}, column {column!r}"


def read_table(path: str | Path) -> Table:
    """The rows of a file, each a dict. Empty lines are skipped; a byte-order mark is too.

    Raises FileNotFoundError, ImportError without the package for parquet and the hub, and ValueError, naming file and
    line, for anything that is no row.
    """
    path = str(path)
    if path.startswith(HUB):
        return _read_hub(path)
    if path.endswith(".parquet"):
        return _read_parquet(path)
    text = _read_text(path)
    table = _read_array(path, text) if text.lstrip().startswith("[") else _read_lines(path, text)
    if not table.rows:
        raise ValueError(f"{path} is empty: a dataset needs at least one row")
    return table


def _read_text(path: str) -> str:
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: a damaged gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; {LEGAL}") from None


def _read_lines(path: str, text: str) -> Table:
    rows = []
    numbers = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other separators in a string
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}); one object a line, or one array of objects") from None
        rows.append(_require_object(row, place))
        numbers.append(number)
    return Table(path, rows, numbers)


def _read_array(path: str, text: str) -> Table:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); it begins as an array of objects") from None
    rows = [_require_object(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return Table(path, rows, list(range(1, len(rows) + 1)), "row")


def _require_object(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f'{place}: a {type(row).__name__}; each row must be an object, as {{"prompt": ...}}')
    return row


# ------------------------------------------------------------------------------------------------- through `datasets`


def _read_parquet(path: str) -> Table:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _of_dataset(path, _datasets(path).Dataset.from_parquet(path))


def _read_hub(path: str) -> Table:
    datasets = _datasets(path)
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: {reason}; legal: hf://OWNER/NAME[:SPLIT] of a dataset that is public or cached"
        ) from None
    return _of_dataset(path, found)


def _datasets(path: str):
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{path} needs the package `datasets`: pip install 'rljax[data]'") from None
    return datasets


def _of_dataset(path: str, rows: Sequence[dict]) -> Table:
    return Table(path, [dict(row) for row in rows], list(range(1, len(rows) + 1)), "row")
