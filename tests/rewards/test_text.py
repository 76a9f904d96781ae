"""Text and format rewards: what earns, and what must not."""

import functools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljax.rewards.format import matches, think_then_answer
from rljax.rewards.text import ANIMALS, animals, distinct_words, exact_text


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [("42", "42", 1), (" 42\n", 42, 1), ("42", " 42 ", 1), ("42.0", 42, 0), ("042", "42", 0), ("42 42", 42, 0)],
)
def test_exact_text(completion, answer, value):
    assert exact_text(completion, answer) == value


@pytest.mark.parametrize(
    ("answer", "found"), [(None, "null"), (["a"], "a list"), (True, "a bool"), (float("nan"), "nan"), ({}, "a dict")]
)
def test_an_answer_that_is_no_text_is_an_error(answer, found):
    with pytest.raises(ValueError, match=rf"^column 'answer' is {found}; legal: a text or a number$"):
        exact_text(str(answer), answer)


@pytest.mark.parametrize(
    ("story", "count"),
    [
        *[("", 0), ("Once upon a time there was a girl.", 0), ("A cat.", 1), ("CATS and Cat's cat", 1)],
        *[("The dog saw a bird.", 2), ("two mice, one mouse", 1), ("a bunny and a rabbit", 1)],
        *[("Foxes chased the sheep and the wolves", 3), ("cat dog bird fish", 3)],
        *[("category dogma birdhouse", 0), ("hotdog", 0), ("cat_dog", 2), ("bear,lion;ant", 3)],
    ],
)
def test_animals(story, count):
    assert animals(story) == count / 3


@given(st.sampled_from([*ANIMALS, "the", "a"]), st.integers(1, 200), st.sampled_from([" ", "", ", ", "\n", "-"]))
def test_one_word_repeated_earns_at_most_a_third(word, times, between):
    assert animals(between.join([word] * times)) <= 1 / 3


@given(st.lists(st.sampled_from(["once", "upon", "a", "time", "happy", "little", "girl", "played", "the", "end"])))
def test_length_earns_nothing(words):
    assert animals(" ".join(words * 50)) == 0


@given(st.lists(st.sampled_from([*ANIMALS, "the", "saw"])), st.sampled_from([*ANIMALS, "the"]))
def test_order_and_repetition_change_nothing_and_a_word_adds_at_most_one(words, more):
    value = animals(" ".join(words))
    assert animals(" ".join(words[::-1] * 2)) == value
    assert 0 <= value <= animals(" ".join([*words, more])) <= min(1, value + 1 / 3) + 1e-12


def test_there_are_about_thirty_animals():
    assert 25 <= len(set(ANIMALS.values())) <= 40
    assert all(word.isalpha() and word.islower() for word in ANIMALS)


def test_distinct_words_of_another_list():
    colours = functools.partial(distinct_words, words={"red": "red", "crimson": "red", "blue": "blue"}, max_count=2)
    assert [colours(text) for text in ("green", "Red crimson", "red BLUE", "blue red blue")] == [0, 0.5, 1, 1]
    with pytest.raises(ValueError, match="max_count=0"):
        distinct_words("red", words={}, max_count=0)


def test_matches_is_the_whole_completion_and_travels():
    digits = pickle.loads(pickle.dumps(functools.partial(matches, pattern=r"\d+")))
    assert [digits(text) for text in ("12", "12 ", "a12", "")] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>so</think><answer>4</answer>", 1),
        ("\n<think>\nso\n\nit is</think>\n<answer> 4 </answer>\n", 1),
        *[("<think>so</think>", 0), ("4", 0), ("", 0), ("<answer>4</answer><think>so</think>", 0)],
        *[("well <think>so</think><answer>4</answer>", 0), ("<think>so</think> hm <answer>4</answer>", 0)],
        *[("<think>so</think><answer>4</answer> bye", 0), ("<think> </think><answer>4</answer>", 0)],
        *[("<think>so</think><answer></answer>", 0), ("<think>a</think><think>b</think><answer>4</answer>", 0)],
        *[("<think>a<answer>3</answer></think><answer>4</answer>", 0), ("<THINK>so</THINK><answer>4</answer>", 0)],
    ],
)
def test_think_then_answer(completion, value):
    assert think_then_answer(completion) == value
