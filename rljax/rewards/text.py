"""Rewards of plain text: an exact answer, and which words a text uses."""

import re
from collections.abc import Mapping

from rljax.ops.templates import is_text_or_number, shown_value


def exact_text(completion: str, answer: object) -> float:
    """1.0 if the completion is the answer and nothing else (white space around either aside), else 0.0.

    Raises ValueError for an answer that is neither a text nor a number.
    """
    if isinstance(answer, bool) or not is_text_or_number(answer):
        raise ValueError(f"column 'answer' is {shown_value(answer)}; legal: a text or a number")
    return float(completion.strip() == str(answer).strip())


def distinct_words(completion: str, *, words: Mapping[str, str], max_count: int) -> float:
    """The number of *different* things that the completion names, at most `max_count`, divided by it: in [0, 1].

    `words`: spelling in lower case -> the thing it names ("mice" -> "mouse"). Whole words count, in any case. Neither
    repetition nor length is rewarded: one word repeated scores 1 / max_count.
    """
    if max_count < 1:
        raise ValueError(f"max_count={max_count}; it must be at least 1")
    found = {words[word] for word in re.findall(r"[^\W\d_]+", completion.lower()) if word in words}
    return min(len(found), max_count) / max_count


def animals(completion: str) -> float:
    """The number of different animals that a story names, at most 3, divided by 3: for a TinyStories model."""
    return distinct_words(completion, words=ANIMALS, max_count=3)


_REGULAR = (
    *("ant", "bear", "bee", "bird", "cat", "chicken", "cow", "deer", "dog", "duck", "elephant", "fish", "frog"),
    *("giraffe", "goat", "horse", "lion", "monkey", "owl", "pig", "rabbit", "shark", "snake", "spider", "squirrel"),
    *("tiger", "turtle"),
)
ANIMALS: Mapping[str, str] = {
    **{name: name for name in _REGULAR},
    **{name + "s": name for name in _REGULAR},
    **{"mouse": "mouse", "mice": "mouse", "fox": "fox", "foxes": "fox", "wolf": "wolf", "wolves": "wolf"},
    **{"butterfly": "butterfly", "butterflies": "butterfly", "sheep": "sheep", "fishes": "fish"},
    **{"bunny": "rabbit", "bunnies": "rabbit", "kitten": "cat", "kittens": "cat", "kitty": "cat"},
    **{"puppy": "dog", "puppies": "dog", "doggy": "dog", "birdie": "bird", "hen": "chicken", "hens": "chicken"},
}
