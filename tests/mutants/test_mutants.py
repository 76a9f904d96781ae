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


@pytest.mark.parametrize(("source", "count"), [("x = 1", 0), ("return a - b\nreturn a - b", 2)])
def test_a_mutant_without_its_one_place_is_refused(source, count):
    mutant = MUTANTS[0]._replace(old="return a - b", new="return b - a")
    with pytest.raises(ValueError, match=f"its old text is {count} times in"):
        mutated(source, mutant)
