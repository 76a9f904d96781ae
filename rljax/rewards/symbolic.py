r"""Whether the final answer is the same mathematics, by math-verify (github.com/huggingface/Math-Verify), an extra.

The final answer of a text is its last `\boxed{}`; of one without, what math-verify finds in it: an expression in LaTeX
or a number. Two answers are equal where their values are, so 1/2, 0.5 and 50\% are one answer, and a unit counts for
nothing. Sets, tuples, intervals, equations and words in \text{} are compared too.

Its own deadlines, which need signals, are off: the pool's deadline counts. The training process does not call it.
"""

import functools
import logging

from rljax.rewards.number import last_box

try:  # with this module, so that the import of sympy is not part of a call's deadline
    import math_verify
except ImportError:
    math_verify = None
else:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its deadlines are off


def equal_math(completion: str, answer: object) -> float:
    r"""1.0 if the final answer of the completion equals `answer`, else 0.0.

    `answer`: a number, an expression in LaTeX, or a solution with it in its last `\boxed{}` or after `####`.
    Raises ImportError without math-verify, and ValueError for an answer that it cannot read.
    """
    if math_verify is None:
        raise ImportError("the verifier of mathematics needs math-verify: pip install 'rljax[verify]'")
    correct = _read_answer("" if answer is None or isinstance(answer, bool) else str(answer))
    box = last_box(completion)
    found = _read(completion if box is None else r"\boxed{" + box + "}")
    return float(math_verify.verify(correct, found, timeout_seconds=None))


@functools.lru_cache(maxsize=256)  # the completions of a prompt have one answer
def _read_answer(text: str) -> list:
    """The answer in its last box, or after `####`, or the whole text. One that does not equal itself is not read."""
    box = last_box(text)
    part = text.rpartition("####")[2] if box is None else box
    answer = _read(r"\boxed{" + part.strip().strip("$") + "}")
    if not answer or not math_verify.verify(answer, answer, timeout_seconds=None):
        shown = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
        raise ValueError(
            f"column 'answer' holds no mathematics that math-verify reads: {shown!r}. Legal: a number, an expression "
            r"in LaTeX, or a solution that ends with it in \boxed{}"
        )
    return answer


def _read(text: str) -> list:
    return math_verify.parse(text, parsing_timeout=None)
