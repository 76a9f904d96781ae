"""Answers that are mathematics: math-verify in the pool, and one line where it is not installed."""

import json
import os
from pathlib import Path

import pytest

from rljax.rewards import symbolic
from rljax.rewards.number import last_box
from rljax.rewards.pool import Pool
from rljax.rewards.symbolic import equal_math

MATH = Path(os.environ.get("RLJAX_SHARED", "../shared")) / "data" / "math_500.jsonl"
needs_extra = pytest.mark.skipif(symbolic.math_verify is None, reason="needs math-verify (the extra `verify`)")


def test_without_the_extra_it_is_one_line(monkeypatch):
    monkeypatch.setattr(symbolic, "math_verify", None)
    with pytest.raises(ImportError, match=r"needs math-verify: pip install 'rljax\[verify\]'$"):
        equal_math("4", "4")


@needs_extra
@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        *[("so 1/2", "0.5", 1), (r"\boxed{0.5}", r"\frac12", 1), (r"\boxed{50\%}", "1/2", 1), ("3", 3, 1)],
        *[("it is $x+1$", "$1+x$", 1), (r"\boxed{(1,2)}", "(1,2)", 1), (r"\boxed{(2,1)}", "(1,2)", 0)],
        *[(r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1), (r"\boxed{\text{Ann}}", r"\text{Evelyn}", 0)],
        *[(r"\boxed{3} or \boxed{4}", "4", 1), (r"\boxed{4} or \boxed{3}", "4", 0), ("4", "2 + 2\n#### 4", 1)],
        *[("", "3", 0), (r"\boxed{}", "3", 0), ("no idea", "3", 0), (r"\boxed{\frac{1}{}", "3", 0)],
    ],
)
def test_answers_of_one_value_are_equal(completion, answer, right):
    assert equal_math(completion, answer) == right


@needs_extra
@pytest.mark.parametrize("answer", ["", "   ", None, True, "####"])
def test_an_answer_that_is_no_mathematics_is_refused(answer):
    with pytest.raises(ValueError, match=r"column 'answer' holds no mathematics .* Legal: a number, an expression"):
        equal_math("4", answer)


@needs_extra
@pytest.mark.skipif(not MATH.is_file(), reason="needs $RLJAX_SHARED/data/math_500.jsonl")
def test_solutions_of_math_500():
    """Each is right against its own last box, and wrong against the next problem's where that is another text.

    Two answers of one value are one answer, however they are written; no two neighbours here are such.
    """
    solutions = [json.loads(line)["solution"] for line in MATH.read_text(encoding="utf-8").splitlines()]
    answers = [last_box(solution) for solution in solutions]
    others = answers[1:] + answers[:1]
    own = [((solution,), {"answer": answer}) for solution, answer in zip(solutions, answers, strict=True)]
    other = [
        ((solution,), {"answer": of_other})
        for solution, answer, of_other in zip(solutions, answers, others, strict=True)
        if answer != of_other
    ]
    with Pool(workers=2, timeout_seconds=60) as pool:
        accepted, refused = pool.map_each([(equal_math, own), (equal_math, other)])
    assert len(accepted) == 500
    assert {(result.value, result.status) for result in accepted} == {(1.0, "ok")}
    assert {(result.value, result.status) for result in refused} == {(0.0, "ok")}
