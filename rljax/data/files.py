"""Rows of a file: jsonl, a JSON array, either of them gzipped; parquet files and the hub through `datasets`."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rljax.data.formats import TEXTS

HUB = "hf://"
NESTED = (*TEXTS, "completions", "gold", "tools")  # columns of messages and of JSON schemas
LEGAL = "legal: .jsonl, .json (lines, or one array), either of them with .gz; .parquet; hf://OWNER/NAME[@REVISION][/CONFIG][:SPLIT]"


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
        table = _read_hub(path)
    elif path.endswith(".parquet"):
        table = _read_parquet(path)
    else:
        text = _read_text(path)
        if text.startswith("version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; get it with: git lfs pull")
        table = _read_array(path, text) if text.lstrip().startswith("[") else _read_lines(path, text)
    if not table.rows:
        raise ValueError(f"{path} is empty: a dataset needs at least one row")
    return table


def _read_text(path: str) -> str:
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory; {LEGAL}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (EOFError, OSError, zlib.error) as error:
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
        row = _loads(line, place, "one object a line, or one array of objects" if rows else LEGAL)
        rows.append(_require_object(row, place))
        numbers.append(number)
    return Table(path, rows, numbers)


def _read_array(path: str, text: str) -> Table:
    rows = _loads(text, path, "it begins as an array of objects")
    rows = [_require_object(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return Table(path, rows, list(range(1, len(rows) + 1)), "row")


def _loads(text: str, place: str, legal: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{place}: JSON that is nested too deeply to be read") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise ValueError(f"{place}: not JSON ({error}); {legal}") from None


def _require_object(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f'{place}: a {type(row).__name__}; each row must be an object, as {{"prompt": ...}}')
    return row


# ------------------------------------------------------------------------------------------------- through `datasets`


def _read_parquet(path: str) -> Table:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    datasets = _datasets(path)
    return _of_dataset(path, lambda: datasets.Dataset.from_parquet(path))


def _read_hub(path: str) -> Table:
    name, _, split = path.removeprefix(HUB).partition(":")
    owner, _, rest = name.partition("/")
    dataset, _, config = rest.partition("/")
    dataset, _, revision = dataset.partition("@")
    datasets = _datasets(path)
    options = {"split": split or "train", "revision": revision or None}
    return _of_dataset(path, lambda: datasets.load_dataset(f"{owner}/{dataset}", config or None, **options))


def _datasets(path: str):
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{path} needs the package `datasets`: pip install 'rljax[data]'") from None
    return datasets


def _of_dataset(path: str, load: Callable[[], Iterable[dict]]) -> Table:
    try:
        rows = [{name: _without_absent(name, value) for name, value in row.items()} for row in load()]
    except Exception as error:  # of many libraries: network, hub, arrow
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: datasets cannot read it: {reason}") from None
    return Table(path, rows, list(range(1, len(rows) + 1)), "row")


def _without_absent(column: str, value: Any) -> Any:
    """The value without nulls in its objects: a column of objects has every key in each, null where it was absent."""

    def clean(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: clean(inner) for name, inner in part.items() if inner is not None}
        return [clean(inner) for inner in part] if isinstance(part, list) else part

    return clean(value) if column in NESTED else value
