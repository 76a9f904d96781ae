"""The examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for room in ("rljax", "experiments") for path in sorted((ROOT / room).glob("**/*.py"))]
WITH_EXAMPLES = [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


def test_there_are_examples():
    assert len(WITH_EXAMPLES) >= 5


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_of_a_module_run(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    result = doctest.testmod(module)
    assert result.attempted > 0, f"{path}: >>> stands where no docstring is"
    assert result.failed == 0
