"""One name for one thing, and the field's name: no public name is defined twice, and no name that was given up returns.

tests/old_names.txt lists the names that were given up. CHANGELOG.md may mention them.
"""

import ast
import fnmatch
import io
import json
import re
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
READ = ("rljax/**/*.py", "experiments/**/*.py", "experiments/**/*.md", "notebooks/*.ipynb", "docs/*.md", "README.md")

# Functions that several modules have because they implement one interface.
INTERFACES = {"init", "reset", "State", "step"}


# ----------------------------------------------------------------------------------------------- one word, one meaning


def public_names(source: str) -> set[str]:
    """Functions, classes and module-level aliases of a module; constants in capitals are not among them."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_") and not name.isupper()}


def defined_twice(sources: dict[str, str]) -> dict[str, list[str]]:
    homes = defaultdict(list)
    for path, source in sources.items():
        for name in public_names(source):
            homes[name].append(path)
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_no_public_name_is_defined_in_two_modules():
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("rljax/**/*.py"))}
    twice = defined_twice(sources)
    assert {name: paths for name, paths in twice.items() if name not in INTERFACES} == {}
    assert twice.keys() >= INTERFACES, "not defined twice any more"


def test_what_is_defined_twice_is_found():
    one = "def f(): pass\nclass C:\n    def g(self): pass\nAlias = int\nLIMIT = 1\n_h = 2\n"
    two = "Alias: type = float\nclass f: pass\ndef g(): pass\nLIMIT = 2\n_h = 3\n"
    assert defined_twice({"a.py": one, "b.py": two}) == {"f": ["a.py", "b.py"], "Alias": ["a.py", "b.py"]}


# --------------------------------------------------------------------------------------------------- the field's words


class OldName(NamedTuple):
    old: str
    new: str
    globs: tuple[str, ...]


def old_names() -> list[OldName]:
    lines = (ROOT / "tests" / "old_names.txt").read_text().splitlines()
    words = [line.split() for line in lines if line and line[0] not in "#["]
    return [OldName(old, new, tuple(globs) or ("*",)) for old, new, *globs in words]


def words_of(path: str, text: str) -> tuple[set[str], set[str]]:
    """The names of a text (identifiers, strings of one word, what is in backticks), and all of its words."""
    if path.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    names = {part for quoted in re.findall(r"`([^`\n]+)`", text) for part in re.findall(r"\w+", quoted)}
    if path.endswith(".py"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                names.add(token.string)
            if token.type == tokenize.STRING and re.fullmatch(r"\w+", token.string.strip("\"'")):
                names.add(token.string.strip("\"'"))
    return names, set(re.findall(r"\w+", text))


def found(path: str, text: str, old: list[OldName]) -> list[str]:
    """Old names in a text. One that is a word of English is looked for among the names, unless it has no new name."""
    names, words = words_of(path, text)
    return [
        f"{path}: {name.old} is now {name.new}"
        for name in old
        if any(fnmatch.fnmatch(path, glob) for glob in name.globs)
        and name.old in (words if "_" in name.old or name.new == "-" else names)
    ]


def test_no_old_name_returns():
    old = old_names()
    assert len(old) > 40
    paths = [path for pattern in READ for path in sorted(ROOT.glob(pattern))]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    assert len(texts) > 100
    assert [line for path, text in texts.items() for line in found(path, text, old)] == []


@pytest.mark.parametrize(
    ("path", "text", "names"),
    [
        ("rljax/a.py", "def gone(x): return x", ["gone"]),
        ("rljax/a.py", 'metrics = {"gone": 1}', ["gone"]),
        ("rljax/a.py", '"""See `old_name`."""', ["old_name"]),
        ("rljax/a.py", "# as old_name does", ["old_name"]),
        ("rljax/a.py", "# what is gone is an English word", []),
        ("rljax/a.py", "# thou art", ["thou"]),
        ("rljax/ops/a.py", "here = 1", ["here"]),
        ("rljax/rewards/a.py", "here = 1", []),
        ("docs/a.md", "| `gone` | how many are gone |", ["gone"]),
        ("docs/a.md", "they are gone", []),
    ],
)
def test_what_is_refused(path, text, names):
    old = [OldName("gone", "new", ("*",)), OldName("old_name", "new", ("*",)), OldName("thou", "-", ("*",))]
    old.append(OldName("here", "new", ("rljax/ops/*",)))
    assert [line.split()[1] for line in found(path, text, old)] == names
