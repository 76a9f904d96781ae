"""Prompts: an order that a cursor resumes, what is dropped, and demonstrations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljax.data.demonstrations import demonstrations
from rljax.data.files import read_table
from rljax.data.prompts import Prompts, from_template, pad_left, shuffled_indices, train_eval_split
from rljax.types import check_shapes

LETTERS = [{"text": text} for text in ("abc", "a", "abcdefg", "ab", "abcd", "zzzzzzzzz", "q")]


def encode(text):
    return [ord(c) for c in text]


def make(columns=LETTERS, max_tokens=8, **options):
    return Prompts(columns, [encode(row["text"]) for row in columns], max_tokens, **options)


# ------------------------------------------------------------------------------------------------------------- order


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 200), st.integers(0, 100), st.integers(0, 100))
def test_order_is_a_pure_function_of_seed_and_cursor(size, seed, start, one, two):
    """Any cut of the draws gives the same draws, across the borders of epochs too."""
    whole = shuffled_indices(size, seed, start, one + two)
    parts = [shuffled_indices(size, seed, start, one), shuffled_indices(size, seed, start + one, two)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_draws_each_prompt_once(size, seed, epoch):
    assert sorted(shuffled_indices(size, seed, epoch * size, size)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [shuffled_indices(50, seed, epoch * 50, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


# ----------------------------------------------------------------------------------------------------------- prompts


def test_batches_hold_every_prompt_once_and_are_few_widths():
    words = [{"text": "x" * n} for n in (3, 40, 1, 17, 16, 2, 33)]
    batches = list(make(words, max_tokens=40, pad=7).batches(3))
    assert [rows.number.tolist() for rows in batches] == [[2, 5, 0], [4, 3, 6], [1]]
    assert [rows.tokens.shape for rows in batches] == [(3, 16), (3, 64), (1, 64)]
    for rows in batches:
        for i, ids, real in zip(rows.number, rows.tokens, rows.mask, strict=True):
            assert ids[real].tolist() == encode(words[i]["text"])
            assert real.tolist() == sorted(real)
            assert (ids[~real] == 7).all()


def test_draws_hold_the_prompts_and_their_columns():
    prompts = make(seed=3, pad=7)
    assert (len(prompts), prompts.dropped, prompts.length) == (6, 1, 7)  # "zzzzzzzzz" is too long
    rows = prompts.draw(4, 9)
    assert rows.cursor == 13
    assert rows.tokens.shape == (9, 7)
    assert rows.number.tolist() == list(range(4, 13))
    for ids, real, row in zip(rows.tokens, rows.mask, rows.columns, strict=True):
        assert ids[real].tolist() == encode(row["text"])
        assert real.tolist() == sorted(real)  # on the right: the last column is the prompt's last token
        assert (ids[~real] == 7).all()
    order = shuffled_indices(6, 3, 4, 9)
    assert rows.columns == [prompts.columns[i] for i in order]


def test_a_cursor_resumes():
    prompts = make(seed=3)
    first = prompts.draw(0, 5)
    again = make(seed=3).draw(np.int32(first.cursor), 5)  # as a checkpoint holds it
    assert [*first.columns, *again.columns] == prompts.draw(0, 10).columns
    assert again.tokens.dtype == again.number.dtype == np.int32


def test_first_is_the_datasets_own_order():
    rows = make().first(3)
    assert [row["text"] for row in rows.columns] == ["abc", "a", "abcdefg"]
    assert len(make().first(1000).columns) == 6


@pytest.mark.parametrize(
    ("columns", "max_tokens", "message"),
    [
        ([], 8, "the dataset is empty: at least one prompt is needed"),
        ([{"text": "abc"}, {"text": "abcd"}], 2, "every prompt is longer than 2 tokens; the shortest has 3"),
        ([{"text": "abc"}, {"text": ""}], 8, "prompt 1 of the dataset has no tokens"),
    ],
)
def test_datasets_without_a_usable_prompt(columns, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        make(columns, max_tokens)


def test_pad_left():
    tokens, mask = pad_left([[1, 2], [], [3, 4, 5]], 4, 9)
    assert tokens.tolist() == [[9, 9, 1, 2], [9, 9, 9, 9], [9, 3, 4, 5]]
    assert mask.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(("size", "count", "held"), [(10, 3, 3), (10, 9, 5), (3, 8, 1), (2, 1, 1)])
def test_held_out_rows_are_not_trained_on(size, count, held):
    train, eval_side = train_eval_split(range(size), count, 0)
    assert (len(train), len(eval_side)) == (size - held, held)
    assert {*train} | {*eval_side} == set(range(size))
    assert train_eval_split(range(size), count, 0) == (train, eval_side)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9))
def test_equal_keys_are_on_one_side(keys, eval_size, seed):
    train, eval_side = train_eval_split(keys, eval_size, seed)
    assert train
    assert eval_side
    if len(set(keys)) == 1:
        assert train == eval_side == list(range(len(keys)))
        return
    assert sorted(train + eval_side) == list(range(len(keys)))
    assert not {keys[i] for i in train} & {keys[i] for i in eval_side}
    smallest = min(keys.count(key) for key in keys)
    assert len(eval_side) <= max(min(eval_size, len(keys) // 2), smallest)


def test_a_single_row_serves_both_sides():
    assert train_eval_split("a", 4, 0) == ([0], [0])
    with pytest.raises(ValueError, match="0 prompts to hold out; at least 1"):
        train_eval_split("ab", 0, 0)


def test_template_names_columns():
    assert from_template("Q: {question}\nA:")({"question": "{1}?", "answer": 3}) == "Q: {1}?\nA:"
    assert from_template(r"\boxed{{{n}}} of {x[y]}")({"n": 3, "x": {"y": 1.5}}) == r"\boxed{3} of 1.5"
    for template in ("{q}", "{question.text}", "{}"):
        with pytest.raises(ValueError, match=r"does not fit .*; legal in braces: answer, question"):
            from_template(template)({"question": "", "answer": ""})
    with pytest.raises(ValueError, match=r"'\\\\boxed\{' does not parse .*; \{\{ and \}\} write a brace"):
        from_template(r"\boxed{")


@pytest.mark.parametrize(
    ("value", "found"), [(None, "null"), ([{"role": "user"}], "a list"), ({"a": 1}, "a dict"), (math.nan, "nan")]
)
def test_template_takes_text_and_numbers(value, found):
    with pytest.raises(ValueError, match=f"column 'q' is {found}; legal in a template: text and numbers"):
        from_template("Q: {q}")({"q": value, "other": None})
    assert from_template("Q: {other}")({"q": value, "other": 1}) == "Q: 1"


# ------------------------------------------------------------------------------------------------------------- gsm8k


def test_gsm8k_prompts_over_the_limit_are_dropped(shared):
    rows = read_table(shared / "data" / "gsm8k_test.jsonl").rows
    prompts = Prompts(rows, [encode(row["question"]) for row in rows], 200)
    kept = [row for row in rows if len(row["question"]) <= 200]
    assert prompts.columns == kept
    assert prompts.dropped == len(rows) - len(kept) > 100


# ---------------------------------------------------------------------------------------------------- demonstrations


def test_demonstrations_are_prompt_and_completion():
    rows = make([{"text": "ab"}, {"text": "abcd"}]).first(2)
    traj = demonstrations(rows, [[1, 2, 0], [3, 0]], 4)
    check_shapes(traj)
    assert traj.inputs.tolist() == [[0, 0, 97, 98, 1, 2, 0], [97, 98, 99, 100, 3, 0, 0]]
    assert traj.actions.tolist() == [[0, 97, 98, 1, 2, 0, 0], [98, 99, 100, 3, 0, 0, 0]]
    assert traj.mask.astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0]]
    assert traj.segments.tolist() == [[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]]
    assert np.where(traj.segments, traj.positions, 0).tolist() == [[0, 0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0]]
    assert np.unique(traj.temperature).tolist() == [1.0]
    assert traj.group.tolist() == [0, 1]


def test_demonstrations_that_are_too_long():
    with pytest.raises(
        ValueError, match="example 1 of the batch has a prompt of 1 tokens and 3 of completion; at most 7 and 2 fit"
    ):
        demonstrations(make().first(2), [[1], [1, 2, 3]], 2)
