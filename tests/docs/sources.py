"""What stands in the code, for the tests of pages that speak of it: read once."""

import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLE = "\0"  # what an f-string fills in


@lru_cache
def trees() -> dict[Path, ast.Module]:
    """Every module of rljax and of the experiments."""
    files = [*ROOT.glob("rljax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


@lru_cache
def strings() -> list[str]:
    """Every string of theirs on one line, with HOLE where something is filled in; no docstrings."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            found.add(node.value)
    return [text.replace("\n", " ") for text in found]
