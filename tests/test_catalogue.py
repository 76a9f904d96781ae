"""docs/algorithms.md says what there is, and nothing is missing from it."""

import ast
import functools
import importlib
import inspect
from types import CodeType, ModuleType

import pytest

import rljax.algorithms
from rljax.types import Algorithm
from tests import catalogue, test_golden, test_laws
from tests.algorithms.tiny import ALGORITHMS, asked_for, rollout, with_defaults


def test_the_page_is_what_would_be_written_today():
    assert catalogue.PAGE.read_text() == catalogue.page(), "run: make tables (or python -m tests.catalogue)"


def test_every_method_has_a_row_an_export_and_an_entry_in_the_tables_of_the_laws():
    methods, rows = catalogue.methods(), catalogue.rows().keys()
    assert len(methods) > 60
    assert methods - rows == set(catalogue.BLOCKS)
    under_law = set().union(*catalogue.methods_in_algorithms().values(), *catalogue.methods_in_objectives().values())
    for name in methods & rows:
        assert getattr(rljax.algorithms, catalogue.base_name(name)) is catalogue.functions()[name]
        assert name in under_law or catalogue.base_name(name) in catalogue.CONTROL


def test_blocks_are_what_methods_are_built_of():
    calls = {
        ast.unparse(node.func)
        for module in catalogue.modules().values()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
    }
    assert {catalogue.base_name(name) for name in catalogue.BLOCKS} <= calls


def test_the_laws_are_those_of_the_tests():
    assert {law.key for law in catalogue.laws(catalogue.LAWS)} == {None, *test_laws.EXCEPTIONS}
    for path, tables in ((catalogue.LAWS, {"EVERY", "except_for", "COMPARES"}), (catalogue.PREFERENCES, {"EVERY"})):
        tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        named = [node for node in tests if node.name.startswith("test_") and "name" in ast.unparse(node.args)]
        over_all = [node for node in named if any(t in ast.unparse(d) for t in tables for d in node.decorator_list)]
        assert len(over_all) == len(catalogue.laws(path)) >= 6
    assert catalogue.laws_obeyed("grpo.grpo") == "all"
    assert catalogue.laws_obeyed("real.real") == "all but *on-policy gradient*, *packing*"


FIELDS = {"rewards": "rewards", "groups": "group", "steps": "step_ends", "scores": "scores"}
ALONE = {entry: next(iter(used)) for entry, used in catalogue.methods_in_algorithms().items() if len(used) == 1}


def credits(algorithm, traj):
    """Whether `credit` needs no more than this trajectory. Which error it raises is not specified."""
    try:
        algorithm.credit(traj, {})
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", sorted(set(ALONE.values())))
def test_the_data_of_a_row_are_what_its_credit_reads(name):
    classified = set(catalogue.rows()[name].data.split(", ")) & FIELDS.keys()
    entries = [ALGORITHMS[entry] for entry, method in ALONE.items() if method == name]
    read = set()
    for algorithm in entries:
        traj = asked_for(algorithm, rollout())
        assert credits(algorithm, traj)
        read |= {word for word, field in FIELDS.items() if not credits(algorithm, traj.replace(**{field: None}))}
    assert classified == read


def called(run) -> set[str]:
    """Functions of rljax, with their module, that a function of tests/golden calls, itself or through its helpers."""
    found = set()
    seen = []
    todo = [run]
    while todo:
        x = todo.pop()
        x = getattr(x, "__wrapped__", x)  # of a jitted function
        if any(x is y for y in seen):
            continue
        seen.append(x)
        if isinstance(x, functools.partial):
            todo += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple):
            todo += x
        elif inspect.isfunction(x) and x.__module__.startswith("rljax."):
            found.add(f"{x.__module__}.{x.__name__}".removeprefix("rljax."))
        elif inspect.isfunction(x) and x.__module__.startswith("tests."):
            names = set()
            codes = [x.__code__]
            while codes:
                code = codes.pop()
                names.update(code.co_names)
                codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            known = [x.__globals__[name] for name in names & x.__globals__.keys()]
            rooms = [room for room in known if isinstance(room, ModuleType) and room.__name__.startswith("rljax.")]
            todo += [y for y in known if not isinstance(y, ModuleType)]
            todo += [getattr(room, name) for room in rooms for name in names if hasattr(room, name)]
            todo += [cell.cell_contents for cell in x.__closure__ or ()]
    return found


@pytest.mark.parametrize("file", test_golden.TABLE)
def test_what_a_golden_file_pins_is_what_its_row_runs(file):
    entry = test_golden.TABLE[file]
    names = called(entry.run)
    for pin in catalogue.pinned(entry.pins):
        room, name = pin.split(".")[0], catalogue.base_name(pin)
        if room == "algorithms":
            assert catalogue.qualified_name(name) in catalogue.rows(), f"{pin} has no row"
            assert catalogue.import_name(catalogue.qualified_name(name)) in names, f"{pin} is not called"
        else:
            assert any(f"{found}.".startswith(f"{pin}.") for found in names), f"{pin} is not called"
            importlib.import_module(f"rljax.{'.'.join(pin.split('.')[:2])}")


def test_what_is_read_from_docstrings():
    text = """Name: what it is (arXiv:1234.56789).

        L = x
        y = z

    The paper takes 3. That is all. Left out: the rest.
    """
    assert catalogue.equations(text) == ["    L = x\n    y = z"]
    assert catalogue.remarks(text) == "The paper takes 3. Left out: the rest."
    assert catalogue.paper_links("cpo.simpo") == "[2405.14734](https://arxiv.org/abs/2405.14734)"
    assert catalogue.paper_links("reinforce.reinforce") == "Williams 1992"
    assert catalogue.settings("gspo.gspo") == "low=0.0003, high=0.0004"
    assert catalogue.needs("wrappers.with_positive_nll") == []
    assert catalogue.needs("reward_shaping.kl_in_reward") == ["ref_logp"]


def test_an_algorithm_that_is_not_listed_is_tested_with_its_defaults():
    def mine(low: float = 0.2) -> Algorithm:
        return rljax.algorithms.grpo(low)

    def with_constant(length: float) -> Algorithm:
        return rljax.algorithms.dr_grpo(length)

    offered = {"grpo": rljax.algorithms.grpo, "mine": mine, "with_constant": with_constant, "other": len}
    assert with_defaults(offered, {"grpo": None}).keys() == {"mine"}
    assert ALGORITHMS.keys() == catalogue.methods_in_algorithms().keys()
