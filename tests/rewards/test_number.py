"""The final number: what people and models write, and 2,638 solutions whose publishers said which are right."""

import decimal
import json
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljax.rewards.number import exact_number, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("72", 72), ("so it is 72.", 72), ("**72**", 72), ("it is 72!", 72), ("(72)", 72), ("=72", 72), ("72\n", 72)],
        *[("1,080", 1080), ("$1,080,000.50.", "1080000.50"), ("12, 13", 13), ("1,2", 2), ("1,2345", 2345)],
        *[("$18", 18), ("-$18", -18), ("$-18", -18), ("50%", 50), ("18km", 18), ("€5", 5)],
        *[("-3", -3), ("(-3)", -3), ("= \N{MINUS SIGN}3", -3), ("- 4", -4), ("it is - 4", -4)],
        *[("3.0", 3), (".5", "1/2"), ("-.5", "-1/2"), ("0.10", "1/10"), ("1/2", "1/2"), ("6/4", "3/2"), ("1e3", 1000)],
        *[("<<48/2=24>>24 clips", 24), ("H2O", None), ("", None), ("none", None), ("nan", None)],
        *[("inf", None), ("1/0", None), ("5 and 1/0", None), ("9" * 5000, None), ("0." + "9" * 5000, None)],
        *[("2\n#### 1,080", 1080), ("#### 5\n6", 6), ("7 ####", None), ("#### 1 #### 2", 2)],
        *[(r"\boxed{72}", 72), (r"\boxed{72}. In 3 steps.", 72), (r"\boxed{1} and \boxed{2}", 2), (r"\boxed{4", 4)],
        *[(r"\boxed{1{,}080}", 1080), (r"\boxed{1\,080}", 1080), (r"\boxed{\$18}", 18), (r"\boxed{50\%}", 50)],
        *[(r"\boxed{\frac{1}{2}}", "1/2"), (r"-\dfrac{1}{2}", "-1/2"), (r"\boxed{18 \text{ eggs}}", 18)],
        *[(r"\boxed{x = 5}", 5), (r"\boxed{90^\circ}", 90), (r"\boxed{18 dollars}", 18)],
        *[(r"5 \boxed{x}", None), (r"\boxed{2\sqrt{3}}", None), (r"\boxed{\sqrt{2}}", None), (r"\boxed{x^2}", None)],
        # digits in groups, mixed numbers, signs and fractions as LaTeX has them
        *[("5 000", 5000), ("5\N{THIN SPACE}000", 5000), ("$5\N{NO-BREAK SPACE}000.50", "5000.5"), ("5 0000", 0)],
        *[("1 234 567", 1234567), ("in 2010 500", 500), (r"1\ 000", 1000), (r"\boxed{5 000}", 5000)],
        *[("2 2/3", "8/3"), ("-2 2/3", "-8/3"), ("4 10/3", None)],
        *[(r"2\frac{2}{3}", "8/3"), (r"\boxed{2\frac23}", "8/3")],
        *[(r"\boxed{- 5}", -5), (r"\boxed{\frac12}", "1/2"), (r"-\frac12", "-1/2"), (r"\frac{3}4", "3/4")],
        # part of a larger expression
        *[("10^3", None), ("10^{3}", None), ("2^-3", None), ("7-4", None), ("7 - 4", None), ("5-10 days", None)],
        *[("2 * 5", None), ("2 x 5", None), ("2 + 5", None), ("2 × 5", None), (r"2 \times 5", None), ("x - 5", None)],
        *[("10:30", None), ("12:00", None), ("16/2/4", None), ("6/2.5", None), ("2/3/2020", None), ("√2", None)],
        *[(r"\sqrt{2}", None), (r"2\sqrt{n}", None), (r"3\pi", None), ("(1+2)/3", None), ("n^2", None)],
        *[("3!", None), ("so x = 3!", None), ("The answer is: $3!", 3), ("3! = 6", 6), ("3x", None), ("y = 2n", None)],
        *[("3x + 1 = 7", 7), ("3 xylophones", 3), ("3xyz", 3), ("5x faster", None)],
        *[("7 - 4 = 3", 3), ("2 * 5 is 10", 10), ("page 3: 12", 12), ("COVID-19", 19), ("**72**", 72), ("+5", 5)],
        *[("so 2\nA: 18", 18), ("Answer: 7", 7), ("A: 3\nA: 4", 4), ("A: none of 7 - 4", None), ("DNA: 5", 5)],
        *[("10³", None), ("10₂", None), ("10_2", None), ("2⋅3", None), ("5±1", None), (r"5 \pm 1", None), ("5π", None)],
        *[("3 : 1", None), ("1–2", None), ("1 – 2", None), ("1_000", None), ("5'000", None), ("1e400", None)],
        *[("5k", None), ("3i", None), ("5 million", None), ("17 mod 5", None), ("5 choose 2", None), ("5 x", None)],
        *[("5 * x", None), ("5 + x", None), ("5/x", None), ("2 times 5", None), ("5 minus $3", None), ("-(5)", None)],
        *[("f(3)", None), ("5(3)", None), ("gcd(12, 18)", None), ("(3, 4)", None), ("|-5|", None), ("log 8", None)],
        *[(r"\log_2 8", None), (r"\binom{5}{2}", None), (r"\frac{10}{x}", None), (r"\frac{a}{2}", None)],
        *[(r"\sqrt[3]{8}", None), (r"\boxed{5 \text{ million}}", None), (r"\boxed{x - 5}", None)],
        # by itself, whatever stands beside it
        *[("5 km/h", 5), ("$6/m", 6), ("18/day", 18), ("5m", 5), ("5 cm²", 5), ("5°", 5), ("5元", 5), ("5th", 5)],
        *[("18 (eighteen)", 18), ("18(eighteen)", 18), ("| 5 |", 5), ("_18_", 18), ("≈5", 5), (r"x \le 5", 5)],
        *[("5 - a lot", 5), ("5 times", 5), ("5 x-rays", 5), ("• 5", 5), (r"\(5\)", 5), (r"is $5$.", 5)],
        *[("–5", -5), ("The answer – 5", 5), ("½", "1/2"), ("2½", "5/2"), ("1⁄2", "1/2"), (r"2\frac{4}{2}", None)],
        *[(r"\cfrac{1}{2}", "1/2"), (r"\frac{1}{-2}", "-1/2"), (r"\frac{1.5}{2}", "3/4"), (r"\frac{1}{0}", None)],
        *[(r"\boxed{(5)}", 5), (r"\boxed{\left(5\right)}", 5), (r"\boxed{\text{5}}", 5), (r"\textbf{5}", 5)],
        *[(r"{\bf 5}", 5), (r"\Large{5}", 5), (r"\color{red}{5}", 5), (r"\boxed{\textcolor{red}{5}}", 5), ("✅5", 5)],
        *[(r"\boxed {5} and 6", 5), (r"\fbox{5} and 6", 5), ("**Answer:** 18\n", 18), ("**Final Answer**: 18", 18)],
        *[(r"\boxed{3x}", None), (r"\boxed{1 1/2}", "3/2"), (r"\boxed{(3, 4)}", None), (r"\boxed{}", None)],
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


@given(
    st.integers(1 - 10**30, 10**30 - 1),
    st.sampled_from(["{}", "${}", "{:,}", "so {:,}.", r"\boxed{{{}}}", "1\n#### {:,}"]),
)
def test_any_integer_in_any_dress(number, dress):
    assert exact_number(dress.format(number), number) == 1.0
    assert exact_number(dress.format(number), number + 1) == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_exact(number):
    assert final_number(f"it is {number:f}.") == Fraction(number)


@given(st.text(alphabet="0123456789,./$%-+eE#{}\\ x\n"))
def test_any_text_is_a_number_or_none(text):
    assert isinstance(final_number(text), Fraction | None)


def reading_seconds(text: str) -> float:
    """The least CPU time of three readings."""
    found = []
    for _ in range(3):
        start = time.process_time()
        final_number(text)
        found.append(time.process_time() - start)
    return min(found)


PIECES = (
    *("1,000,", ",000", "\\boxed{", "\\frac{", "^ ", "{", "-", ".5", "9", "1/", "####", "\\text{", "(1,"),
    *("5 – ", "f_{", "½"),
)
BY_DAY = (",000", "\\frac{")


@pytest.mark.parametrize(
    "piece", [pytest.param(piece, marks=() if piece in BY_DAY else pytest.mark.nightly) for piece in PIECES]
)
def test_long_texts_are_read_fast(piece):
    """A text of 16 times the length takes about 16 times as long, not 256 times."""
    short, long = ("1 ^" + piece * (characters // len(piece)) for characters in (6_250, 100_000))
    assert reading_seconds(long) < 64 * max(reading_seconds(short), 1e-3)


@pytest.mark.parametrize(
    "answer",
    [
        *[3, 3.0, np.int32(3), np.float32(3), Fraction(3), decimal.Decimal("3.0")],
        *["3", " 3. ", "3.00", "$3", "6/2", "1 + 2 = 3\n#### 3", r"thus \boxed{3}", "3 apples"],
    ],
)
def test_answer_columns(answer):
    assert exact_number("it is 3.0", answer) == 1.0
    assert exact_number("it is 30", answer) == 0.0
    assert exact_number("who knows", answer) == 0.0


@pytest.mark.parametrize(
    "answer", ["", "none", None, float("nan"), float("inf"), True, "2 or 3", r"2\sqrt{3}", "5 #### ", "1/0", [1, 2]]
)
def test_an_answer_column_without_one_number_is_named(answer):
    with pytest.raises(ValueError, match="column 'answer' holds no number"):
        exact_number("3", answer)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_every_gsm8k_answer_is_right_by_itself(shared, name):
    rows = read(shared / f"data/{name}.jsonl")
    assert all(exact_number(row["answer"], row["answer"]) == 1.0 for row in rows)


def test_it_agrees_with_the_publishers_of_gsm8k(shared):
    """Two 6B models' solutions to the test set, labelled by the data set's authors: 2,638 of 2,638 agree."""
    rows = read(shared / "data/gsm8k_solutions_6b.jsonl")
    verdicts = [exact_number(row["solution"], row["answer"].rpartition("A:")[2]) == 1.0 for row in rows]
    assert len(rows) == 2638
    assert [row["solution"] for row, verdict in zip(rows, verdicts, strict=True) if verdict != row["is_correct"]] == []
