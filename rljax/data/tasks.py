"""Small tasks with generated problems: lists of {"prompt", "answer"}."""

import itertools

import numpy as np


def addition_problems() -> list[dict]:
    """The 10,000 sums of two numbers below 100, answers in three digits: {"prompt": "12+34=", "answer": "046"}."""
    pairs = itertools.product(range(100), repeat=2)
    return [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a, b in pairs]


def sorting_problems(digits: int = 6) -> list[dict]:
    """Every order of `digits` different digits, to be sorted: {"prompt": "504183=", "answer": "013458"}."""
    orders = itertools.permutations("0123456789", digits)
    return [{"prompt": "".join(order) + "=", "answer": "".join(sorted(order))} for order in orders]


def train_eval_split_by_kind(
    problems: list[dict], eval_size: int, seed: int, kinds: int = 16
) -> tuple[list[dict], list[dict]]:
    """A random split into (training, evaluation): at least `eval_size` evaluation problems, of at least `kinds` kinds.

    Problems made of the same characters are of one kind and stay on the same side, so that 34+12 is no training problem
    where 12+34 is evaluated. All orders of the same digits have one sorted answer: few kinds would mean few answers.
    """
    by_kind: dict[str, list[dict]] = {}
    for problem in problems:
        kind = "".join(sorted(problem["prompt"]))
        by_kind.setdefault(kind, []).append(problem)
    groups = list(by_kind.values())
    order = np.random.default_rng([1, seed]).permutation(len(groups))
    train: list[dict] = []
    evaluation: list[dict] = []
    for taken, i in enumerate(order):
        wants_size = len(evaluation) < eval_size
        wants_kinds = taken < kinds and eval_size > 0
        side = evaluation if wants_size or wants_kinds else train
        side.extend(groups[i])
    return train, evaluation
