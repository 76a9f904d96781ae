"""Rewards of code: what passes, what fails, whose fault it is, and that a solution cannot reach its tests."""

import dataclasses
import functools
import gzip
import json
import os
from pathlib import Path

import pytest

from experiments import score
from experiments.common.rewards import read_rewards
from experiments.common.settings import Reward
from experiments.common.verifiers import VERIFIERS
from rljax.rewards import code, sandbox
from rljax.rewards.code import TestCounts, fenced_code, function_tests, solution_source, stdin_tests
from rljax.rewards.pool import Pool
from rljax.rewards.sandbox import SandboxError
from rljax.rewards.worker import CouldNotJudge, call_verifier

HUMANEVAL = Path(os.environ.get("RLJAX_SHARED", "../shared")) / "data" / "humaneval.jsonl.gz"
SECONDS = 60.0  # nothing here takes long, but a machine may be busy
PROMPT = (
    'import math\n\n\ndef twice(x):\n    """Twice x."""\n    return helper(x)\n\n\ndef half(x):\n    """Half of x."""\n'
)
TEST = """
def check(candidate):
    assert candidate(4) == 2
    for x in (1.0, 3.0):
        assert math.isclose(candidate(x), x / 2), "close"
"""


@pytest.fixture(autouse=True)
def available():
    try:
        sandbox.probe_isolation("namespaces")
    except SandboxError as error:
        pytest.skip(str(error))


def counts(completion: str, test: str = TEST, prompt: str = PROMPT, seconds: float = SECONDS) -> TestCounts:
    source = solution_source(completion, prompt, "half")
    return code.run_function_tests(source, prompt, test, "half", "namespaces", seconds)


def judged(completion: str, **change) -> float:
    return function_tests(completion, PROMPT, TEST, "half", **{"seconds": SECONDS} | change)


@pytest.mark.parametrize(
    "completion",
    [
        "    return x / 2\n",
        "```python\n    return x / 2\n```",
        "Here it is:\n```python\ndef half(x):\n    return x / 2\n```\nIt divides.",
        "def half(x):\n    return math.fsum([x]) / 2",
        "First:\n```\nnothing\n```\nNow:\n```py\ndef half(x):\n    return x / 2",
    ],
)
def test_what_passes(completion):
    assert judged(completion) == 1.0


@pytest.mark.parametrize(
    ("completion", "passed", "status"),
    [
        ("    return None\n", 0, "ok"),
        ("    return 2\n", 1, "ok"),
        ("    return x // 2\n", 1, "ok"),
        ("    return (x\n", 0, "ok"),
        ("    raise ValueError\n", 0, "ok"),
        ("    return x / 2\n\nraise SystemExit(0)", 0, "ok"),
        ("    import os; os._exit(0)\n", 0, "ok"),
        ("    import os; os.abort()\n", 0, "ok"),
        ("    return [0] * 10**10\n", 0, "ok"),
        ("    return half(x)\n", 0, "ok"),
        ("", 0, "ok"),
    ],
)
def test_what_fails(completion, passed, status):
    assert counts(completion) == TestCounts(passed, 3, status)


def test_partial_credit_is_the_share_of_the_tests():
    assert judged("    return 2\n", partial_credit=True) == pytest.approx(1 / 3)
    assert judged("    return 2\n") == 0.0


@pytest.mark.parametrize("completion", ["    while True: pass\n", "    import time; time.sleep(600)\n"])
def test_a_solution_that_does_not_end_fails_all_that_is_left(completion):
    assert counts(f"    if x == 4: return 2\n{completion}", seconds=1.0) == TestCounts(1, 2, "timeout")


def test_a_loop_of_tests_that_does_not_end_is_never_all_of_them():
    test = "def check(candidate):\n    for i in range(100):\n        assert candidate(i) == i"
    assert counts("    while x: pass\n    return 0\n", test, seconds=1.0) == TestCounts(1, 2, "timeout")


CHEATS = {
    "a number that equals everything": "    class E(float):\n        def __eq__(self, other): return True\n"
    "        __hash__ = None\n    return E(9)\n",
    "writes a verdict": "    import os\n    for d in range(64):\n        try: os.write(d, b'1111.')\n"
    "        except OSError: pass\n    return 0\n",
    "kills the judge": "    import os\n    os.kill(os.getppid(), 9)\n    return 0\n",
    "changes builtins": "    import builtins, math\n    builtins.bool = lambda x: True\n"
    "    math.isclose = lambda *x: True\n    return 0\n",
    "looks for the tests": """
    import gc, os, sys
    word = "".join(["is", "close"])
    texts = [open(name).read() for name in os.listdir(".")]
    frame = sys._getframe()
    while frame:
        texts += [str(value) for value in frame.f_locals.values()]
        frame = frame.f_back
    texts += [str(found) for found in gc.get_objects() if isinstance(found, (dict, list)) and found is not texts]
    return x / 2 if any(word + "(candidate" in text for text in texts) else None
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_solution_cannot_reach_its_tests(name):
    assert judged(CHEATS[name], partial_credit=True) == 0.0


TAKE_OVER = """
import os
for name in ("copy", "decimal", "random", "typing"):
    with open(name + ".py", "w") as file:
        file.write("import os\\nfor d in range(64):\\n    try: os.write(d, b'1.')\\n    except OSError: pass\\n")
        file.write("os._exit(0)")
half = lambda x: 0
"""
WAIT = "import os\nwhile not os.path.exists('typing.py'): pass\n"  # the last that is written


@pytest.mark.parametrize("place", ["prompt", "test"])
def test_the_judge_imports_nothing_that_a_solution_wrote(place):
    imports = f"{WAIT}import copy, decimal, random, typing\n"
    prompt = imports + PROMPT if place == "prompt" else PROMPT
    test = imports + TEST if place == "test" else TEST
    found = code.run_function_tests(TAKE_OVER, prompt, test, "half", "namespaces", SECONDS)
    assert found == TestCounts(0, 3, "ok")


CROSSING = r"""
def check(candidate):
    values = [(1, [2.5, None]), {'a': {1, 2}, (1,): frozenset([3])}, b'x', 1j, True, -10**5000, float('inf'), '\ud800é']
    for value in values:
        assert candidate(value) == value
        assert type(candidate(value)) is type(value)
"""
RAISING = """
def check(candidate):
    try:
        candidate(1)
    except ZeroDivisionError as error:
        assert 'zero' in str(error)
    else:
        assert False
"""


def test_values_and_exceptions_cross_unchanged():
    assert counts("    return x\n", CROSSING) == TestCounts(16, 16, "ok")
    assert counts("    return 1 / 0\n", RAISING) == TestCounts(1, 1, "ok")
    assert counts("    return 1\n", RAISING) == TestCounts(0, 1, "ok")


DERIVED = """
def check(candidate):
    for name in ("derived", "stop", "arguments"):
        try:
            candidate(name)
        except KeyError as error:
            assert name == "derived" and error.args == ("x", 3)
        except UnicodeDecodeError as error:
            assert name == "arguments" and error.reason == "?"
        except RuntimeError:
            assert name == "stop"
    assert not all(map(candidate, ["stop"]))
"""


def test_exceptions_keep_what_they_are_derived_from_and_never_end_a_loop_of_the_tests():
    solution = """
    class Missing(KeyError): pass
    if x == "derived":
        raise Missing("x", 3)
    raise StopIteration if x == "stop" else UnicodeDecodeError("utf-8", b"", 0, 1, "?")
"""
    assert counts(solution, DERIVED) == TestCounts(3, 4, "ok")


@pytest.mark.parametrize(
    ("solution", "test", "passed", "total"),
    [
        ("x.sort(key=lambda y: -y[0])", "x = [[1], [3]]\nhalf(x)\nassert x == [[3], [1]]", 1, 1),
        ("x['a'].append(1); del x['b']", "x = {'a': [], 'b': 2}\nhalf(x=x)\nassert x == {'a': [1]}", 1, 1),
        ("x.add(1); raise KeyError", "x = set()\ntry: half(x)\nexcept KeyError: pass\nassert x == {1}", 1, 1),
        ("x[:] = sorted(x) + [None]", "x = [2, 1]\nassert half(x) is None\nassert x == [1, 2]", 1, 2),
        ("return (i for i in range(x))", "assert list(half(3)) == [0, 1, 2]\nassert half(1) != [0]", 2, 2),
        ("return map(str, [x, 1])", "assert next(half(3)) == '3'\nassert sum(map(int, half(3))) == 4", 2, 2),
        ("return range(0, x, 2)", "assert half(4) == range(0, 4, 2)\nassert list(half(3)) == [0, 2]", 2, 2),
    ],
)
def test_what_a_solution_changes_or_yields_reaches_the_tests(solution, test, passed, total):
    assert counts(f"    {solution}\n", test) == TestCounts(passed, total, "ok")


@pytest.mark.parametrize(
    ("solution", "test", "reason"),
    [
        (
            "return x(2)",
            "assert half(lambda y: y) == 2",
            "the tests call half with an argument of type function",
        ),
        ("return x.year", "import datetime\nassert half([datetime.date(1, 1, 1)]) == 1", "of type date; legal: None"),
        ("return x.pop()", "assert half({1: bytearray(2)}) == 0", "of type bytearray; legal: None"),
        ("x[0].sort()", "x = ([2, 1],)\nhalf(x)\nassert x == ([1, 2],)", "changes what stands in a tuple"),
        ("return lambda: x", "try: y = half(2)()\nexcept: pass\nassert y == 2", "returns a value of type function"),
        ("import itertools; return itertools.count()", "assert next(half(1)) == 0", "a value of type count; legal"),
        ("return bytes(2**24)", "assert len(half(1)) == 2**24", r"returns 16,777,\d+ bytes; legal: 16,777,216"),
        ("class E:\n        __eq__ = print\n    return E()", "assert half(1) == 1", "a value of type E; legal: None"),
        ("return []", "for y in half(1):\n    assert y == 1", "the tests end before their first assert"),
    ],
)
def test_what_cannot_cross_judges_nothing(solution, test, reason):
    with pytest.raises(CouldNotJudge, match=reason):
        counts(f"    {solution}\n", test)


def test_tests_that_raise_by_themselves():
    raising = "def check(candidate):\n    if candidate(4) != 2:\n        raise Exception('wrong')"
    assert counts("    return x / 2\n", raising) == TestCounts(1, 1, "ok")
    assert counts("    return x\n", raising) == TestCounts(0, 1, "ok")


def test_columns_that_do_not_run_are_the_datas_fault():
    with pytest.raises(ValueError, match="the column test is no Python"):
        counts("    return 1\n", "def check(:")
    for wrong in ("undefined\nhalf", "undefined\ndef check(candidate): candidate(1)", "def check(f): f(undefined)"):
        with pytest.raises(ValueError, match=r"(?s)the columns prompt and test do not run: .*NameError"):
            counts("    return 1\n", wrong)
    with pytest.raises(ValueError, match=r"(?s)the columns prompt and test do not run: .*KeyError"):
        counts("    return 1\n", prompt="{}['x']\n" + PROMPT)


@pytest.mark.parametrize("test", ["", "def test_half(candidate):\n    assert candidate(2) == 1"])
def test_a_column_without_check_is_no_test(test):
    with pytest.raises(ValueError, match=r"^the column test defines no check\(candidate\); legal: source that does"):
        function_tests("", PROMPT, test, "half")


@pytest.mark.parametrize(
    "test",
    [
        "def check(candidate): pass",
        "def check(candidate):\n    for x in ():\n        assert candidate(x) == 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(half(2), 1)",
        "def check(candidate):\n    assert True",
    ],
)
def test_a_column_that_never_calls_the_function_is_no_test(test):
    with pytest.raises(ValueError, match="the tests never call half: every solution would pass"):
        counts("    return x\n", test)


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("prompt", [{"role": "user"}], "a list"),
        ("prompt", None, "null"),
        ("test", 3, "a int"),
        ("entry_point", None, "null"),
    ],
)
def test_columns_that_are_no_texts_are_named(column, value, found):
    columns = {"prompt": PROMPT, "test": TEST, "entry_point": "half"} | {column: value}
    with pytest.raises(
        ValueError, match=f"^column '{column}' is {found}; legal: source of Python, as HumanEval has it"
    ):
        function_tests("", **columns)


@pytest.mark.parametrize("failure", ["raise KeyError(x)", "import os; os._exit(3)", "raise SystemExit(3)"])
def test_a_solution_that_fails_outside_an_assert_is_not_the_datas_fault(failure):
    test = "r = half(4)\nassert r == 2"
    assert counts("    return x / 2\n", test) == TestCounts(1, 1, "ok")
    assert counts(f"    {failure}\n", test) == TestCounts(0, 1, "ok")


def test_no_process_for_the_solution_judges_nothing(monkeypatch):
    monkeypatch.setattr(code, "ResourceLimits", functools.partial(sandbox.ResourceLimits, processes=1))
    with pytest.raises(CouldNotJudge, match="no process for the solution"):
        counts("    return x / 2\n")


def test_a_sandbox_that_is_not_to_be_had_judges_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_reason_against", lambda level: "no kernel")
    sandbox.probe_isolation.cache_clear()
    result = call_verifier(function_tests, ("", PROMPT, TEST, "half"), {})
    assert result[:2] == (None, "died")
    assert "'namespaces' is not available here (no kernel)" in result.detail
    sandbox.probe_isolation.cache_clear()


# ----------------------------------------------------------------------------------------------------- stdin and stdout

SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 -5", "output": "0"}]


@pytest.mark.parametrize(
    ("program", "share"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')\nprint()\n```", 1.0),
        ("print(3)", 0.5),
        ("print(sum(map(int, input().split())))\n1/0", 0.0),
        ("print(sum(map(int, input().split()))); input()", 0.0),
        ("if input() == '1 2': print(3)\nelse:\n    import os; os.kill(os.getpid(), 9)", 0.5),
        ("", 0.0),
    ],
)
def test_programs_of_stdin_and_stdout(program, share):
    assert stdin_tests(program, SUMS, seconds=SECONDS, partial_credit=True) == share
    assert stdin_tests(program, json.dumps(SUMS), seconds=SECONDS) == float(share == 1)


def test_all_tests_have_one_deadline():
    found = code.run_stdin_tests("while True: pass", [("", ""), ("", "")], "namespaces", 1.0, stop_early=False)
    assert found == TestCounts(0, 2, "timeout")


def test_the_first_test_that_fails_may_be_the_last(monkeypatch):
    ran = []
    run = code._run
    monkeypatch.setattr(code, "_run", lambda *arguments: ran.append(arguments[1]) or run(*arguments))
    found = code.run_stdin_tests("print(input())", [("a", "a"), ("b", "x"), ("c", "c")], "namespaces", SECONDS, True)
    assert (found, ran) == (TestCounts(1, 3, "ok"), ["a", "b"])


@pytest.mark.parametrize("tests", ["", "[]", "[1]", '[{"input": "1"}]', [{"input": "1", "output": 1}], "{", None])
def test_tests_that_are_none(tests):
    with pytest.raises(ValueError, match="legal: "):
        stdin_tests("", tests)


@pytest.mark.parametrize(
    ("completion", "program"),
    [("a", "a"), ("x\n```\n\n```\n```py\na\n```", "a\n"), ("```\na\n```\n```\n```\nb", "a\n"), ("say `a`", "say `a`")],
)
def test_what_is_in_the_fence(completion, program):
    assert fenced_code(completion) == program


# ------------------------------------------------------------------------------------------------------------ HumanEval


def problems() -> list[dict]:
    if not HUMANEVAL.is_file():
        pytest.skip("needs $RLJAX_SHARED/data/humaneval.jsonl.gz")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def judge_in_pool(rows: list[dict], completions: list[str]) -> list[tuple[float | None, str]]:
    """In worker processes, as a run does."""
    names = ("prompt", "test", "entry_point")
    calls = [((text,), {name: row[name] for name in names}) for row, text in zip(rows, completions, strict=True)]
    with Pool(workers=2, timeout_seconds=2 * SECONDS) as pool:
        return [result[:2] for result in pool.map(functools.partial(function_tests, seconds=SECONDS), calls)]


def test_some_of_humaneval():
    rows = [row for row in problems() if int(row["task_id"].split("/")[1]) in (0, 32, 38, 50, 107, 151)]
    assert judge_in_pool(rows, [row["canonical_solution"] for row in rows]) == [(1.0, "ok")] * 6


@pytest.mark.nightly
def test_humaneval():
    rows = problems()
    assert len(rows) == 164
    assert judge_in_pool(rows, [row["canonical_solution"] for row in rows]) == [(1.0, "ok")] * 164
    assert judge_in_pool(rows, ["    return None\n"] * 164) == [(0.0, "ok")] * 164


# ---------------------------------------------------------------------------------------------------- from the command


def test_a_file_of_solutions_is_scored(tmp_path, monkeypatch):
    rows = [
        {"prompt": PROMPT, "test": TEST, "entry_point": "half", "solution": text}
        for text in ("    return x / 2", "    return 2")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Reward(timeout_seconds=SECONDS, partial_credit=True)
    cfg = score.Config(str(tmp_path / "rows.jsonl"), ("code",), reward=settings, directory=str(tmp_path / "run"))
    found = score.main(cfg)["code"]
    assert found.pop("mean") == pytest.approx(2 / 3)  # `return 2` passes some of the tests
    assert found == {"rows": 2, "failed": 0, "right": 1}
    records = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [record["scores"]["code"] for record in records] == [1.0, pytest.approx(1 / 3)]

    monkeypatch.setattr(sandbox, "_reason_against", lambda level: "no kernel" if level == "seccomp" else None)
    sandbox.probe_isolation.cache_clear()
    demanding = dataclasses.replace(cfg, reward=Reward(isolation="seccomp"), directory=str(tmp_path / "other"))
    with pytest.raises(SandboxError, match="isolation 'seccomp' is not available here"):
        score.main(demanding)
    with pytest.raises(SandboxError, match="isolation 'seccomp' is not available here"):
        read_rewards(("code_stdin",), VERIFIERS, demanding.reward)
    assert not (tmp_path / "other").exists()
    sandbox.probe_isolation.cache_clear()
