"""Tasks that the code makes itself: right answers, and sides that share nothing."""

import re

import pytest

from rljax.data.tasks import additions, sortings, split


def numbers(problem):
    return frozenset(re.findall(r"\d+", problem["prompt"]))


def test_additions_are_right():
    problems = additions()
    assert len({problem["prompt"] for problem in problems}) == 10_000
    for problem in problems:
        a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", problem["prompt"]).groups()
        assert re.fullmatch(r"\d{3}", problem["answer"])
        assert int(problem["answer"]) == int(a) + int(b)


@pytest.mark.parametrize(("digits", "count"), [(6, 151_200), (2, 90)])
def test_sortings_are_right(digits, count):
    problems = sortings(digits)
    assert len({problem["prompt"] for problem in problems}) == count
    for problem in problems[:: max(1, count // 500)]:
        assert re.fullmatch(rf"\d{{{digits}}}=", problem["prompt"])
        assert list(problem["answer"]) == sorted(problem["prompt"][:-1])


@pytest.mark.parametrize("make", [additions, lambda: sortings(4)], ids=["additions", "sortings"])
@pytest.mark.parametrize(("held_out", "seed"), [(1024, 0), (1024, 1), (1, 0)])
def test_sides_share_no_problem(make, held_out, seed):
    problems = make()
    train, exam = split(problems, held_out, seed, kinds=1)
    assert held_out <= len(exam) < held_out + 40  # a kind stays together
    sides = [{problem["prompt"] for problem in side} for side in (train, exam)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {problem["prompt"] for problem in problems}


def test_an_exam_is_about_many_answers():
    _, exam = split(sortings(), 1024, 0)
    assert len({problem["answer"] for problem in exam}) == 16
    assert len(exam) == 16 * 720


def test_swapped_operands_are_the_same_problem():
    """12+34 is not held out from 34+12."""
    train, exam = split(additions(), 1024, 0)
    assert not {numbers(problem) for problem in train} & {numbers(problem) for problem in exam}


def test_split_depends_on_the_seed_alone():
    exams = [[problem["prompt"] for problem in split(additions(), 100, seed)[1]] for seed in (0, 0, 1)]
    assert exams[0] == exams[1]
    assert len(set(exams[0]) & set(exams[2])) < 50
    assert exams[0] != sorted(exams[0])  # first(count) is no corner of the problems
