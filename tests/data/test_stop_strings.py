"""The automaton of stop strings against a search of the text, token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rljax.data.stop_strings import cut, stop_strings, streamed_text

LETTERS = "aab€"  # three bytes of the last: tokens may end inside of it
TEXT = st.text(LETTERS, min_size=1, max_size=6)
PIECE = st.lists(st.sampled_from([b"a", b"b", b"\xe2", b"\x82", b"\xac", "€".encode()]), max_size=5).map(b"".join)


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(PIECE, min_size=1, max_size=8), st.data())
@example(["aab", "ab"], [b"a", b"b"], None)
@example(["abab"], [b"ab", b"aba", b""], None)
def test_it_stops_where_a_search_finds_a_string(strings, pieces, data):
    automaton = stop_strings(strings, pieces)
    assert automaton.dtype == np.int32
    assert automaton.shape[1] == len(pieces)
    assert len(automaton) <= sum(len(s.encode()) for s in strings)
    tokens = st.lists(st.integers(0, len(pieces) - 1), max_size=40)
    drawn = data.draw(tokens) if data else np.random.default_rng(0).integers(0, len(pieces), 200)
    state, text = 0, b""
    for token in drawn:
        state, text = automaton[state, token], text + pieces[token]
        met = any(s.encode() in text for s in strings)
        assert (state < 0) == met
        if met:
            state, text = 0, b""


@given(st.lists(TEXT, min_size=1, max_size=4), st.text(LETTERS, max_size=30))
def test_the_text_is_cut_before_the_string_that_ends_first(strings, text):
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in strings)]
    want = text if not ends else min((text[: ends[0]].removesuffix(s) for s in strings), key=len)
    assert cut(text, strings) == want
    assert cut(text.encode(), [s.encode() for s in strings]) == want.encode()


@given(st.lists(TEXT, max_size=3), st.lists(PIECE, min_size=1, max_size=8), st.data())
def test_what_is_shown_of_an_answer_stays(strings, pieces, data):
    """Until a stop string is met; some bytes are no text, and at the end some are half a character."""
    tokens = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=20))
    texts = [b"".join(pieces[t] for t in tokens[:i]) for i in range(len(tokens) + 1)]
    ends = [s.encode() for s in strings]
    last = next((i for i, text in enumerate(texts) if any(end in text for end in ends)), len(tokens))
    whole = streamed_text(tokens[:last], pieces, ends, over=True)
    assert whole == cut(texts[last], ends).decode("utf-8", "replace")
    shown = [streamed_text(tokens[:i], pieces, ends, over=False) for i in range(last)]
    for before, after in itertools.pairwise([*shown, whole]):
        assert after.startswith(before)
    if not strings and last and texts[last - 1].isascii():
        assert shown[-1] == texts[last - 1].decode()  # at once


def test_bytes_that_are_no_text():
    automaton = stop_strings([b"\xff\n"], [b"\xff", b"\n", b"x\xff\ny"])
    np.testing.assert_array_equal(automaton, [[1, 0, -1], [1, -1, -1]])


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "ab", b"ab"])
def test_no_string_to_stop_at(strings):
    with pytest.raises(ValueError, match="legal: a list of one or more, each of at least one character"):
        stop_strings(strings, [b"a"])
