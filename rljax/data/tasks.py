"""Small tasks that the code makes itself: each a list of {"prompt", "answer"}."""

import itertools

import numpy as np


def additions() -> list[dict]:
    """The 10,000 sums of two numbers below 100, three digits an answer: {"prompt": "12+34=", "answer": "046"}."""
    pairs = itertools.product(range(100), repeat=2)
    return [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a, b in pairs]


def sortings(digits: int = 6) -> list[dict]:
    """Every order of `digits` different digits, to be sorted: {"prompt": "504183=", "answer": "013458"}."""
    orders = itertools.permutations("0123456789", digits)
    return [{"prompt": "".join(o) + "=", "answer": "".join(sorted(o))} for o in orders]


def split(problems: list[dict], held_out: int, seed: int, kinds: int = 16) -> tuple[list[dict], list[dict]]:
    """A random split into (training, held-out): at least `held_out` problems, of at least `kinds` kinds.

    Problems made of the same characters are of one kind and stay on the same side, so that 12+34 is not held out from
    34+12. All orders of the same digits are sorted to one answer: an exam of few kinds would be about few answers.
    """
    by_kind: dict[str, list[dict]] = {}
    for problem in problems:
        by_kind.setdefault("".join(sorted(problem["prompt"])), []).append(problem)
    groups = list(by_kind.values())
    order = np.random.default_rng([1, seed]).permutation(len(groups))
    sides: tuple[list[dict], list[dict]] = ([], [])
    for taken, i in enumerate(order):
        sides[len(sides[1]) < held_out or (taken < kinds and held_out > 0)].extend(groups[i])
    return sides
