"""Rows as token ids, on the host."""

from typing import NamedTuple


class Example(NamedTuple):
    """A text to learn from: a prompt and what follows it."""

    prompt: list[int]  # begins the text; no decision is taken in it
    completion: list[int]  # what follows, end of turn (EOS) included
    mask: list[bool]  # of `completion`: True on the assistant's own tokens
    columns: dict  # the row


class Comparison(NamedTuple):
    """Two completions of one prompt, the better one first."""

    chosen: Example
    rejected: Example
    margin: float | None


class Judgment(NamedTuple):
    """A completion that is judged by itself."""

    example: Example
    desirable: bool


class Steps(NamedTuple):
    """A solution whose steps are labeled."""

    example: Example
    step_ends: list[bool]
    labels: list[float]
