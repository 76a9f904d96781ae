"""Rewards of Python programs that a model writes: the share of unit tests that pass, in the sandbox.

Two formats: HumanEval's (prompt, test, entry_point; Chen et al., arXiv:2107.03374), where a function is called, and
tests of stdin and stdout, where a program is run once for each. What the code does to itself is its own fault: an
exception, a crash, an endless loop or too much memory fails a test. A sandbox that could not be set up judges nothing.
"""

import ast
import json
import marshal
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rljax.rewards.code_judge import COLUMNS_FAIL, NO_VERDICT
from rljax.rewards.sandbox import Execution, Level, ResourceLimits, SandboxError, run_code
from rljax.rewards.worker import CouldNotJudge

JUDGE = Path(__file__).with_name("code_judge.py").read_text(encoding="utf-8")
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class TestCounts(NamedTuple):
    """How a program did: `ok` means that all tests were run, whatever they said."""

    __test__ = False  # no test of pytest's

    passed: int
    total: int
    status: Literal["ok", "timeout", "crashed"]


def function_tests(
    completion: str,
    prompt: str,
    test: str,
    entry_point: str,
    *,
    isolation: Level = "namespaces",
    seconds: float = 4.0,
    partial_credit: bool = False,
) -> float:
    """1.0 if the function passes all tests, else 0.0; with partial credit the share that it passes.

    Args:
      completion: what continues the prompt, or a program that defines the function; fenced or not.
      prompt: imports, helpers, and the beginning of the function, as the model read it.
      test: source that defines check(candidate); each assert counts as a test.
      isolation, seconds: of the sandbox, for all tests together.
    Raises ValueError for columns that are no texts, and for a test that is no Python or never calls the function;
    CouldNotJudge where there is no sandbox, or a value cannot cross between the tests and the function.
    """
    for column, value in {"prompt": prompt, "test": test, "entry_point": entry_point}.items():
        if not isinstance(value, str):
            found = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"column {column!r} is {found}; legal: source of Python, as HumanEval has it")
    counts = run_function_tests(
        solution_source(completion, prompt, entry_point), prompt, test, entry_point, isolation, seconds
    )
    return _value(counts, partial_credit)


def stdin_tests(
    completion: str,
    tests: str | Sequence[dict],
    *,
    isolation: Level = "namespaces",
    seconds: float = 4.0,
    partial_credit: bool = False,
) -> float:
    """1.0 if the program writes what each test expects, else 0.0; with partial credit the share of the tests.

    Args:
      completion: the program, fenced or not.
      tests: [{"input": text, "output": text}, ...], or this as JSON. White space at the end of a line and of the output
        is not compared.
      isolation, seconds: of the sandbox, for all tests together.
    Raises ValueError for tests that are none of these, and CouldNotJudge where there is no sandbox.
    """
    pairs = _read_tests(tests)
    counts = run_stdin_tests(fenced_code(completion), pairs, isolation, seconds, stop_early=not partial_credit)
    return _value(counts, partial_credit)


def _value(counts: TestCounts, partial_credit: bool) -> float:
    if partial_credit:
        return counts.passed / counts.total
    return float(counts.status == "ok" and counts.passed == counts.total)


# ------------------------------------------------------------------------------------------------------- the program


def fenced_code(completion: str) -> str:
    """What stands in the last ``` fence that has content; the whole completion where there is none."""
    blocks = [block for block in FENCE.findall(completion) if block.strip()]
    return blocks[-1] if blocks else completion


def solution_source(completion: str, prompt: str, entry_point: str) -> str:
    """The prompt continued by the completion; where that defines the function itself, it stands after the prompt."""
    code = fenced_code(completion)
    if re.search(rf"^(async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{_with_body(prompt)}\n{code}"
    return prompt + code


def _with_body(prompt: str) -> str:
    """The prompt as a program of its own: its last function does nothing."""
    return f"{prompt.rstrip()}\n    pass\n"


# --------------------------------------------------------------------------------------------------- HumanEval's format


def run_function_tests(
    source: str, prompt: str, test: str, entry_point: str, isolation: Level, seconds: float
) -> TestCounts:
    """Run HumanEval's tests on a solution, in a process that the solution cannot reach (`code_judge.py`)."""
    counting, asserts = _counting_tests(test, entry_point)
    task = {"setup": _with_body(prompt), "test": counting, "entry_point": entry_point, "asserts": asserts}
    found = _run(JUDGE, marshal.dumps(task), {"solution.py": source}, isolation, seconds)
    if found.exit_code == NO_VERDICT:
        raise CouldNotJudge(found.stderr.strip().rpartition("\n")[2][-500:])
    if found.exit_code == COLUMNS_FAIL:
        raise ValueError(f"the columns prompt and test do not run: {found.stderr.strip()[-500:]}")
    results = found.stdout.rstrip(".")
    has_ended = found.stdout.endswith(".")
    # the test that did not end is one more: a loop may hold any number behind a single assert
    total = max(len(results), 1) if has_ended else max(len(results) + 1, asserts)
    unfinished = "timeout" if found.status == "timeout" else "crashed"
    return TestCounts(results.count("1"), total, "ok" if has_ended else unfinished)


class _CountAsserts(ast.NodeTransformer):
    """Turns `assert condition` into `count_test(lambda: condition)`, so that one that fails does not end the tests."""

    def __init__(self):
        self.count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        self.count += 1
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        condition = ast.Lambda(args=nothing, body=node.test)
        call = ast.Call(func=ast.Name("count_test", ast.Load()), args=[condition], keywords=[])
        return ast.copy_location(ast.Expr(call), node)


def _counting_tests(test: str, entry_point: str) -> tuple[str, int]:
    """The source with its asserts counted, and how many it has. Raises ValueError for one that tests nothing."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the column test is no Python: {error}") from None
    names = {name for node in ast.walk(tree) for name in (getattr(node, "name", None), getattr(node, "id", None))}
    if not names & {"check", entry_point}:
        raise ValueError("the column test defines no check(candidate); legal: source that does, as HumanEval has it")
    counter = _CountAsserts()
    changed = ast.fix_missing_locations(counter.visit(tree))
    return ast.unparse(changed), counter.count


# ----------------------------------------------------------------------------------------------------- stdin and stdout


def run_stdin_tests(
    source: str, tests: Sequence[tuple[str, str]], isolation: Level, seconds: float, stop_early: bool
) -> TestCounts:
    """Run the program once for each (input, expected output). stop_early: a test that fails is the last one."""
    deadline = time.monotonic() + seconds
    passed = 0
    status = "ok"
    for given, expected in tests:
        left = deadline - time.monotonic()
        if left <= 0:
            return TestCounts(passed, len(tests), "timeout")
        found = _run(source, given, {}, isolation, left)
        if found.status != "ok":
            status = "timeout" if found.status == "timeout" else "crashed"
        passes = found.status == "ok" and not found.output_cut and _lines(found.stdout) == _lines(expected)
        passed += passes
        if stop_early and not passes:
            break
    return TestCounts(passed, len(tests), status)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _read_tests(tests: str | Sequence[dict]) -> list[tuple[str, str]]:
    try:
        rows = json.loads(tests) if isinstance(tests, str) else tests
        pairs = [(row["input"], row["output"]) for row in rows]
    except (ValueError, TypeError, KeyError):
        pairs = []
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f'tests: {str(tests)[:100]!r}; legal: [{{"input": text, "output": text}}, ...], at least one')
    return pairs


def _run(source: str, stdin: str | bytes, files: dict[str, str], isolation: Level, seconds: float) -> Execution:
    limits = ResourceLimits(seconds=seconds, cpu_seconds=math.ceil(seconds), output_bytes=2**20)
    try:
        return run_code(source, stdin=stdin, files=files, limits=limits, isolation=isolation)
    except SandboxError as error:
        raise CouldNotJudge(str(error)) from None
