"""The list of mutants does not rot: each still has its place, its tests, and changes what the code does."""

import ast
from collections import Counter

import pytest

from tests.mutants.list import MUTANTS
from tests.mutants.run import ROOT, mutated


def meaning(source: str) -> str:
    """The code without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
            node.body[0].value.value = ""
    return ast.dump(tree)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_to_one_place_and_changes_what_the_code_does(mutant):
    source = (ROOT / mutant.file).read_text()
    changed = mutated(source, mutant)
    compile(changed, mutant.file, "exec")
    assert meaning(changed) != meaning(source)
    assert mutant.source
    assert mutant.tests


def test_the_tests_of_the_mutants_exist():
    for node in {node for mutant in MUTANTS for node in mutant.tests}:
        file, _, name = node.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        functions = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
        assert not name or name.split("[")[0] in functions, node


def test_names_are_told_apart():
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert len(MUTANTS) > 50


SOURCE = """
def minus(a, b):
    return a - b

class Sum:
    @property
    def of(a, b):
        def inner(a, b):
            return a - b
        return a - b
"""


@pytest.mark.parametrize(
    ("function", "old", "wrong"),
    [
        ("minus", "a + b", "its old text is 0 times in .*, minus, not once"),
        ("Sum.of", "a - b", "its old text is 2 times in .*, Sum.of, not once"),
        ("", "a - b", "its old text is 3 times in .*, the module, not once"),
        ("inner", "a - b", "defines 0 inner, not one"),
    ],
)
def test_a_mutant_without_its_one_place_is_refused(function, old, wrong):
    mutant = MUTANTS[0]._replace(function=function, old=old, new="b - a")
    with pytest.raises(ValueError, match=wrong):
        mutated(SOURCE, mutant)


@pytest.mark.parametrize(
    ("function", "old", "line"), [("minus", "a - b", 3), ("Sum.of.inner", "a - b", 9), ("Sum.of", "@property", 6)]
)
def test_a_mutant_changes_the_function_that_it_names(function, old, line):
    changed = mutated(SOURCE, MUTANTS[0]._replace(function=function, old=old, new="changed"))
    differ = [n for n, (x, y) in enumerate(zip(SOURCE.split("\n"), changed.split("\n"), strict=True), 1) if x != y]
    assert differ == [line]
