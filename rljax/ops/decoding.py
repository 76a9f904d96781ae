"""Token ids as text, where they follow other ids."""

from collections.abc import Callable, Sequence

CONTEXT_TOKENS = 4  # of the ids before that are decoded too: more than a character has


def text_after(decode: Callable[[list[int]], str], before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to the ids before them: decoded alone, its first space may be lost (SentencePiece).

    >>> text_after(lambda ids: " ".join("-ab"[i] for i in ids), [1], [2])
    ' b'
    """
    last = list(before[-CONTEXT_TOKENS:])
    head = decode(last)
    whole = decode([*last, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(list(ids))
