"""Tasks that the code makes itself: right answers, and sides that share nothing."""

import re

import pytest

from rljax.data.tasks import addition_problems, sorting_problems, train_eval_split_by_kind


def numbers(problem):
    return frozenset(re.findall(r"\d+", problem["prompt"]))


def test_additions_are_right():
    problems = addition_problems()
    assert len({problem["prompt"] for problem in problems}) == 10_000
    for problem in problems:
        a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", problem["prompt"]).groups()
        assert re.fullmatch(r"\d{3}", problem["answer"])
        assert int(problem["answer"]) == int(a) + int(b)


@pytest.mark.parametrize(("digits", "count"), [(6, 151_200), (2, 90)])
def test_sortings_are_right(digits, count):
    problems = sorting_problems(digits)
    assert len({problem["prompt"] for problem in problems}) == count
    for problem in problems[:: max(1, count // 500)]:
        assert re.fullmatch(rf"\d{{{digits}}}=", problem["prompt"])
        assert list(problem["answer"]) == sorted(problem["prompt"][:-1])


@pytest.mark.parametrize("make", [addition_problems, lambda: sorting_problems(4)], ids=["additions", "sortings"])
@pytest.mark.parametrize(("eval_size", "seed"), [(1024, 0), (1024, 1), (1, 0)])
def test_sides_share_no_problem(make, eval_size, seed):
    problems = make()
    train, eval_side = train_eval_split_by_kind(problems, eval_size, seed, kinds=1)
    assert eval_size <= len(eval_side) < eval_size + 40  # a kind stays together
    sides = [{problem["prompt"] for problem in side} for side in (train, eval_side)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {problem["prompt"] for problem in problems}


def test_the_eval_side_has_many_answers():
    _, eval_side = train_eval_split_by_kind(sorting_problems(), 1024, 0)
    assert len({problem["answer"] for problem in eval_side}) == 16
    assert len(eval_side) == 16 * 720


def test_swapped_operands_are_the_same_problem():
    """12+34 is not held out from 34+12."""
    train, eval_side = train_eval_split_by_kind(addition_problems(), 1024, 0)
    assert not {numbers(problem) for problem in train} & {numbers(problem) for problem in eval_side}


def test_split_depends_on_the_seed_alone():
    splits = [train_eval_split_by_kind(addition_problems(), 100, seed) for seed in (0, 0, 1)]
    eval_prompts = [[problem["prompt"] for problem in side] for _, side in splits]
    assert eval_prompts[0] == eval_prompts[1]
    assert len(set(eval_prompts[0]) & set(eval_prompts[2])) < 50
    assert eval_prompts[0] != sorted(eval_prompts[0])  # first(count) is no corner of the problems
