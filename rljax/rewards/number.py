r"""Whether the final number is correct: the built-in matcher for arithmetic and GSM8K (Cobbe et al., arXiv:2110.14168).

The final number of a text is the one in its last `\boxed{}`, else the last one it writes; where the text has a `####`,
or a line that begins with `A:` or `Answer:`, only what follows the last of these is read. Numbers are compared as exact
fractions: 3.0 == 3, 1/2 == 0.5, 2 2/3 == 8/3. Digits may be grouped by commas or spaces: 1,000 == 1 000 == 1000.
`$` and `%` are units and dropped: 50% == 50. Nothing is evaluated: a number that is part of a larger expression (10^3,
7 - 4, 10:30, 2 * 5, 3x, 3!) is no final number; what follows an `=` is. After a word the mark only exclaims: "it is 3!"
is 3.

Left out: words (twelve, 1.8 billion), decimal commas, roots and all other expressions; those need a symbolic verifier.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 100  # a longer "number" is no number (Python refuses to read more than 4300 digits)

_SPACE = " \N{NO-BREAK SPACE}\N{FIGURE SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"  # between groups of digits
_GROUPED = rf"\d{{1,3}}(?:(?:,\d{{3}}){{1,9}}+|(?:[{_SPACE}]\d{{3}}){{1,9}}+)(?!\d)"  # at most 9: linear time
_WHOLE = rf"(?:{_GROUPED}|\d++)"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?<!\d\.)"  # not inside a word or after a decimal part
    r"(?P<sign>(?<![\w)\]}])-[ ]?)?\$?"
    rf"(?P<top>{_WHOLE}(?:\.\d++)?|\.\d++)(?P<power>[eE][+-]?\d{{1,2}}(?!\d))?"
    r"(?:/(?P<bottom>(?:\d{1,3}(?:,\d{3}){1,9}+(?!\d)|\d++))(?!\.\d))?"
)
# What makes the number after it, or before it, part of a larger expression.
_OPERAND = r"(?:[\d)\]}%!]|(?<![A-Za-z])[A-Za-z])"  # a number, a bracket, a variable
_BEFORE = re.compile(
    rf"(?:[\^√]|\\sqrt(?:\[\d+\])?|{_OPERAND}\s*(?:\*\*|[-+*/×·÷]|\\(?:times|cdot|div)|\bx\b))\s*[{{($]*\s*$|\d:$"
)
_SUBTRAHEND = re.compile(rf"{_OPERAND}\s*$")
_AFTER = re.compile(r"\s*(?:\^|[√π×÷·]|\\(?:sqrt|pi|times|cdot|div)|/\s*[\d(])|[xyzn](?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z]{2,}[:,]?\s+[*$]*$")  # before a number after which `!` is no factorial
_CONTEXT = 60  # characters before a number that are looked at
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"), r" \1\2/\3\4"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{[^{}\d]*\}|\^\s*+(?:\{\s*+)?\\circ\s*+\}?"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,]"), ""),  # thin spaces: 1\,000
    (re.compile(r"\\[ ;:]|~"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("\N{MINUS SIGN}"), "-"),
)
_MARK = re.compile(r"####|^[ \t]*(?:A|Answer):", re.MULTILINE)
_BESIDE = re.compile(r"[A-Za-z\s$%€£=:.,*]*")  # what may stand beside the number of a box: units and a name


def exact_number(completion: str, answer: object) -> float:
    """1.0 if the final number of the completion equals `answer`, else 0.0.

    `answer`: a number, a numeric string, or a solution whose part after `####` (or in `\\boxed{}`) is the number.
    Raises ValueError if it holds none, or more than one.
    """
    correct = _read_answer(answer)
    return float(final_number(completion) == correct)


def final_number(text: str) -> Fraction | None:
    """The final number of the text (see the module); None if there is none, or if it is not one number by itself."""
    text = _after_mark(text)
    box = last_box(text)
    if box is not None:
        return _only_number(box)
    text = _plain(text)
    found = _numbers(text)
    return _alone(text, found[-1]) if found else None


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
    end = 0
    for mark in _MARK.finditer(text):
        end = mark.end()
    return text[end:]


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
    found = _numbers(text)
    if len(found) != 1:
        return None
    left = text[: found[0].start]
    right = text[found[0].end :]
    beside = _BESIDE.fullmatch(left) and _BESIDE.fullmatch(right) and not right[:1].isalpha()
    return found[0].value if beside else None


class _Number(NamedTuple):
    """A number as it stands in a text."""

    start: int
    end: int
    signed: bool
    value: Fraction | None  # None: not one number (1/0, 4 10/3)


def _numbers(text: str) -> list[_Number]:
    """The numbers of a text; a mixed number (2 2/3) is one."""
    found: list[_Number] = []
    for match in _NUMBER.finditer(text):
        number = _Number(match.start(), match.end(), bool(match["sign"]), _fraction(match))
        if match["bottom"] and not match["sign"] and found and text[found[-1].end : number.start].isspace():
            number = _mixed(found.pop(), number)
        found.append(number)
    return found


def _mixed(whole: _Number, part: _Number) -> _Number:
    """A whole number and the fraction after it as one number, if it is one: the fraction must be below 1."""
    value = None
    if None not in (whole.value, part.value) and whole.value.denominator == 1 and part.value < 1:
        value = whole.value - part.value if whole.signed else whole.value + part.value
    return _Number(whole.start, part.end, whole.signed, value)


def _alone(text: str, number: _Number) -> Fraction | None:
    """The value of a number that is not part of a larger expression, else None."""
    before = text[max(number.start - _CONTEXT, 0) : number.start]
    is_operand = _BEFORE.search(before) or (number.signed and _SUBTRAHEND.search(before))
    is_factorial = text[number.end : number.end + 1] == "!" and not _WORD.search(before)
    return None if is_operand or is_factorial or _AFTER.match(text, number.end) else number.value


def _plain(text: str) -> str:
    """`text` without the LaTeX that formats a number."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _fraction(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_CHARACTERS:
        return None
    top = Fraction(re.sub(rf"[,{_SPACE}]", "", match["top"]) + (match["power"] or ""))
    bottom = int((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    return (-top if match["sign"] else top) / bottom
