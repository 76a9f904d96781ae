"""Files of rows, each row with its place for error messages: jsonl and json, gzipped or not."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple


class Table(NamedTuple):
    """The rows of a file, and where each stands."""

    path: str
    rows: list[dict]
    numbers: list[int]  # of its line; in a json array its index, counted from 1

    def place(self, i: int) -> str:
        """Where row i stands: "FILE, line 7"."""
        return f"{self.path}, line {self.numbers[i]}"


def read_table(path: str | Path) -> Table:
    """The rows of a file: one object a line, or one array of objects; with .gz at the end of its name, unpacked.

    Raises FileNotFoundError, or ValueError naming the file and line.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    rows = []
    numbers = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(json.loads(line))
            numbers.append(number)
    return Table(str(path), rows, numbers)
