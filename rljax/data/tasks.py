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


def split(problems: list[dict], held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """A random split into (training, held-out) of at least `held_out` problems.

    Problems made of the same characters stay on the same side, so that 12+34 is not held out from 34+12.
    """
    kinds: dict[str, list[dict]] = {}
    for problem in problems:
        kinds.setdefault("".join(sorted(problem["prompt"])), []).append(problem)
    groups = list(kinds.values())
    order = np.random.default_rng([1, seed]).permutation(len(groups))
    sides: tuple[list[dict], list[dict]] = ([], [])
    for i in order:
        sides[len(sides[1]) < held_out].extend(groups[i])
    return sides
