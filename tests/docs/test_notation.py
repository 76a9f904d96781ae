"""docs/notation.md: every field and every function that it names is there, with the shape that rljax/types.py says."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import rljax.types

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notation.md"
COLUMNS = 5


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "symbol"]


def test_every_row_is_whole():
    assert len(rows()) > 40
    assert [row for row in rows() if len(row) != COLUMNS] == []


def test_every_function_is_found():
    for *_, function in rows():
        if function == "–":
            continue
        module, _, name = function.strip("`").rpartition(".")
        found = getattr(importlib.import_module(f"rljax.{module}"), name)
        assert callable(found) or module == "types", function


def test_every_field_has_the_shape_that_the_types_say():
    source = inspect.getsource(rljax.types)
    for symbol, _, field, shape, _ in rows():
        if field == "–":
            continue
        owner, name = field.strip("`").split(".")
        fields = {x.name for x in dataclasses.fields(getattr(rljax.types, owner))}
        assert name in fields, f"{symbol}: {field}"
        body = source.split(f"class {owner}:", 1)[1]
        (comment,) = re.findall(rf"^    {name}: [^#\n]*(?:# (.*))?$", body, flags=re.MULTILINE)[:1]
        if shape.startswith("[") and owner != "Pairs":
            assert comment.startswith(shape), f"{symbol}: {field} is {shape} on the page, and in types.py: {comment}"
