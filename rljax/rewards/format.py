"""Rewards for the format of a completion, independent of its content."""

import re

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_THEN_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def matches(completion: str, *, pattern: str) -> float:
    """1.0 if the regular expression matches the whole completion, else 0.0.

    As a verifier: `functools.partial(matches, pattern=r"...")`. `.` stops at a line's end unless the pattern starts
    with `(?s)`. A pattern that backtracks exponentially is what the pool's deadline is for.
    """
    return float(re.fullmatch(pattern, completion) is not None)


def think_then_answer(completion: str) -> float:
    """1.0 if the completion is exactly `<think>…</think><answer>…</answer>` (DeepSeek-R1, arXiv:2501.12948), else 0.0.

    Each tag once, neither part blank; only white space before, between and after.
    """
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0
    found = _THINK_THEN_ANSWER.fullmatch(completion)
    return float(found is not None and all(part.strip() for part in found.groups()))
