r"""Whether the final number is correct: the built-in matcher for arithmetic and GSM8K (Cobbe et al., arXiv:2110.14168).

The final number of a text is the one in its last `\boxed{}`, else the last one it writes; where the text has a `####`,
only what follows the last `####` is read. Numbers are compared as exact fractions: 3.0 == 3, 1/2 == 0.5, 1,000 == 1000.
`$` and `%` are units and dropped: 50% == 50. Nothing is evaluated.

Left out: mixed numbers (1 1/2), words (twelve, 1.8 billion), decimal commas, roots and all other expressions; those
need a symbolic verifier.
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 100  # a longer "number" is no number (Python refuses to read more than 4300 digits)

_WHOLE = r"(?:\d{1,3}(?:,\d{3}){1,9}+(?!\d)|\d++)"  # at most 9 groups: linear time whatever the text
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?<!\d\.)"  # not inside a word or after a decimal part
    r"(?P<sign>(?<![\w)\]}])-)?\$?"  # a minus, but no subtraction: `7-4` ends in 4
    rf"(?P<top>{_WHOLE}(?:\.\d++)?|\.\d++)(?P<power>[eE][+-]?\d{{1,2}}(?!\d))?"
    rf"(?:/(?P<bottom>{_WHOLE})(?!\.\d))?"
)
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{[^{}\d]*\}|\^\s*+(?:\{\s*+)?\\circ\s*+\}?"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,]"), ""),  # thin spaces: 1\,000
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("\N{MINUS SIGN}"), "-"),
)
_BESIDE = re.compile(r"[A-Za-z\s$%€£=:.,*]*")  # what may stand beside the number of a box: units and a name


def exact_number(completion: str, answer: object) -> float:
    """1.0 if the final number of the completion equals `answer`, else 0.0.

    `answer`: a number, a numeric string, or a solution whose part after `####` (or in `\\boxed{}`) is the number.
    Raises ValueError if it holds none, or more than one.
    """
    correct = _read_answer(answer)
    return float(final_number(completion) == correct)


def final_number(text: str) -> Fraction | None:
    """The final number of the text (see the module); None if there is none or the last box is not one number."""
    text = _after_mark(text)
    box = last_box(text)
    if box is not None:
        return _only_number(box)
    found = list(_NUMBER.finditer(_plain(text)))
    return _fraction(found[-1]) if found else None


def _read_answer(answer: object) -> Fraction:
    text = str(answer)
    part = _after_mark(text)
    box = last_box(part)
    number = None if isinstance(answer, bool) else _only_number(part if box is None else box)
    if number is None:
        shown = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
        raise ValueError(
            f"column 'answer' holds no number: {shown!r}. Legal: a number, a numeric string such as '1,080', "
            "or a solution that ends in '#### 1,080' or '\\boxed{1080}'"
        )
    return number


def _after_mark(text: str) -> str:
    return text.rpartition("####")[2]


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{}` (to the end of the text if it is never closed), None without one."""
    _, mark, rest = text.rpartition("\\boxed{")
    if not mark:
        return None
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:place]
    return rest


def _only_number(text: str) -> Fraction | None:
    """The number of a text that is one number with perhaps a unit or a name (`x = 5`, `18 dollars`), else None."""
    text = _plain(text)
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    left = text[: found[0].start()]
    right = text[found[0].end() :]
    beside = _BESIDE.fullmatch(left) and _BESIDE.fullmatch(right) and not right[:1].isalpha()
    return _fraction(found[0]) if beside else None


def _plain(text: str) -> str:
    """`text` without the LaTeX that formats a number."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _fraction(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_CHARACTERS:
        return None
    top = Fraction(match["top"].replace(",", "") + (match["power"] or ""))
    bottom = int((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    return (-top if match["sign"] else top) / bottom
