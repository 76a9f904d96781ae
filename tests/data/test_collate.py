"""Examples as rows, by hand and against loops in numpy: what is a decision, which columns begin where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.data.demonstrations import collate, collate_after_prompts
from rljax.data.examples import Comparison, Example, Judgment, Steps, ranking
from rljax.data.preferences import (
    collate_pairs,
    collate_rankings,
    collate_unpaired,
    judgments_of,
    mismatched_examples,
)
from rljax.data.steps import collate_steps
from rljax.data.tokenizer import character_tokenizer
from rljax.types import check_shapes

IDS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def example(prompt, completion, mask=None):
    return Example(prompt, completion, [True] * len(completion) if mask is None else mask, {})


@st.composite
def examples(draw):
    prompt = draw(IDS)
    completion = draw(IDS)
    mask = draw(st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)))
    return Example(prompt, completion, mask, {})


def by_loops(found, width, start_of):
    """Inputs, actions, decisions and positions of rows, token by token; -1 where nothing is said of a column."""
    shape = (len(found), width - 1)
    inputs, actions, positions = (np.full(shape, -1) for _ in range(3))
    decides = np.zeros(shape, bool)
    for row, one in enumerate(found):
        whole = one.prompt + one.completion
        decided = [False] * len(one.prompt) + list(one.mask)
        for k in range(len(whole) - 1):
            column = start_of(one) + k
            inputs[row, column], actions[row, column] = whole[k], whole[k + 1]
            decides[row, column], positions[row, column] = decided[k + 1], k
    return inputs, actions, decides, positions


def same(traj, wanted):
    check_shapes(traj)
    inputs, actions, decides, positions = wanted
    inside = positions >= 0
    np.testing.assert_array_equal(np.asarray(traj.segments) > 0, inside)
    for ours, theirs in ((traj.inputs, inputs), (traj.actions, actions), (traj.positions, positions)):
        np.testing.assert_array_equal(np.asarray(ours)[inside], theirs[inside])
    np.testing.assert_array_equal(traj.mask, decides)
    np.testing.assert_array_equal(traj.temperature, 1.0)


@settings(max_examples=20)
@given(st.lists(examples(), min_size=1, max_size=6))
def test_rows_are_what_loops_make_of_them(found):
    same(collate(found, 12), by_loops(found, 12, lambda one: 0))
    same(collate_after_prompts(found, 6, 7), by_loops(found, 13, lambda one: 6 - len(one.prompt)))


def test_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"example 1 of the batch has a prompt of 2 tokens and 3 .*; at most 4 together"
    ):
        collate([example([1], [2]), example([1, 2], [3, 4, 5])], 4)
    with pytest.raises(ValueError, match="a prompt of 2 tokens and 1 of completion; at most 1 and 3 fit"):
        collate_after_prompts([example([1, 2], [3])], 1, 3)


def test_pairs_share_the_columns_of_their_prompt():
    first = Comparison(example([1, 2], [3]), example([1, 2], [4, 5]), 0.5)
    second = Comparison(example([6], [7, 8]), example([6], [9]), None)
    pairs = collate_pairs([first, second], 3, 2, with_margin=True)
    np.testing.assert_array_equal(pairs.chosen.inputs[:, :2], pairs.rejected.inputs[:, :2])
    assert pairs.chosen.actions.tolist() == [[1, 2, 3, 0], [0, 6, 7, 8]]
    assert pairs.rejected.actions.tolist() == [[1, 2, 4, 5], [0, 6, 9, 0]]
    assert pairs.chosen.mask.astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(pairs.margin, [0.5, np.nan])
    assert collate_pairs([first, second], 3, 2).margin is None
    assert judgments_of(first) == (Judgment(first.chosen, True), Judgment(first.rejected, False))


def test_mismatched_rows_hold_the_completion_of_another_prompt():
    found = [example([1], [2, 3]), example([1], [4]), example([5, 6], [7, 8, 9], [True, False, True])]
    others = mismatched_examples(found, found, 5)
    judged = [Judgment(one, desirable) for one, desirable in zip(found, (True, False, True), strict=True)]
    unpaired = collate_unpaired(judged, 5, others)
    assert unpaired.desirable.tolist() == [True, False, True]
    assert unpaired.traj.actions.tolist() == [[2, 3, 0, 0], [4, 0, 0, 0], [6, 7, 8, 9]]
    rows = list(zip(unpaired.mismatched.inputs.tolist(), unpaired.mismatched.mask.astype(int).tolist(), strict=True))
    assert rows[:2] == [([1, 7, 8, 9], [1, 0, 1, 0])] * 2
    assert rows[2] in [([5, 6, 2, 3], [0, 1, 1, 0]), ([5, 6, 4, 0], [0, 1, 0, 0])]
    assert collate_unpaired(judged, 5).mismatched is None
    long = [example([1] * 4, [2]), example([3], [4] * 4)]
    cut = mismatched_examples(long, long, 5)
    assert [one.completion for one in cut] == [[4], [2]]
    with pytest.raises(ValueError, match=r"2 completions of one prompt; legal .* two prompts or more"):
        mismatched_examples(found[:1], found[:2], 5)


def test_mismatched_completions_are_chosen_and_rejected_ones():
    """In a file of pairs they alternate, and every next row with another prompt holds a chosen one."""
    found = [example([p], [side]) for p in range(1, 40) for side in (100, 200)]
    sides = [one.completion[0] for one in mismatched_examples(found, found, 3)]
    assert sides.count(100) == sides.count(200)


def test_rankings_are_filled_up_with_rows_without_a_decision():
    best_first = [example([1, 2], [3]), example([1, 2], [4, 5]), example([1, 2], [6])]
    traj = collate_rankings([best_first, best_first[:2]], 3, 2, 2)
    assert traj.actions.shape == (2, 3, 3)
    assert traj.mask.sum(axis=2).tolist() == [[1, 2, 1], [1, 2, 0]]
    assert traj.actions[0, :, 1].tolist() == [3, 4, 6]


def test_a_row_of_a_ranking():
    tokenizer = character_tokenizer("abxy")
    found = ranking({"prompt": "ab", "completions": ["x", "yy"], "ended": [True, False], "tools": []}, tokenizer)
    assert [one[:3] for one in found] == [example([1, 2], [3, 0])[:3], example([1, 2], [4, 4])[:3]]
    assert all("tools" in one.columns for one in found)
    for wrong in (["only"], "text", None):
        with pytest.raises(ValueError, match="legal: a list of at least two, best first"):
            ranking({"prompt": "ab", "completions": wrong}, tokenizer)


def test_labels_stand_on_the_ends_of_steps():
    solution = Steps(example([1, 2], [3, 4, 5, 6]), [False, True, False, True], [np.nan, 1.0, np.nan, 0.0])
    traj = collate_steps([solution, Steps(example([7], [8]), [True], [0.5])], 7)
    check_shapes(traj)
    assert traj.step_ends.astype(int).tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert traj.rewards.tolist() == [[0, 0, 1, 0, 0, 0], [0.5, 0, 0, 0, 0, 0]]
    assert np.asarray(traj.actions)[np.asarray(traj.step_ends)].tolist() == [4, 6, 8]
    assert (traj.step_ends <= np.asarray(traj.mask)).all()
