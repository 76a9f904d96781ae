r"""Whether the final number is correct: the built-in matcher for arithmetic and GSM8K (Cobbe et al., arXiv:2110.14168).

The final number of a text is the one in its last `\boxed{}`, else the last one it writes; where the text has a `####`,
or a line that begins with `A:` or `Answer:`, only what follows the last of these is read. Numbers are compared as exact
fractions: 3.0 == 3, 1/2 == 0.5, 2 2/3 == 8/3. Digits may be grouped by commas or spaces: 1,000 == 1 000 == 1000.
`$` and `%` are units and dropped: 50% == 50. Nothing is evaluated: a number that is part of a larger expression (10^3,
7 - 4, 10:30, 2 * 5, 3x, 3!) is no final number; what follows an `=` is.

What may stand beside a number by itself: white space and punctuation; a word, and of single letters those that are
units (5 km, 5m); a relation (=, <, \approx); a command of LaTeX that formats. An operator with something on its other
side makes it a part of an expression, and so do a variable, an exponent or index (10³, 10_2), a function or its
brackets (log 8, f(3), \binom{5}{2}), the brackets of a tuple or of a product, bars on both sides, a number that one
sign alone divides from it (1_000, 5'000), and a word that multiplies it (5 million). After a word `!` only exclaims:
"it is 3!" is 3.

Left out: words (twelve, 1.8 billion), decimal commas, roots and all other expressions; those need a symbolic verifier.
"""

import re
import unicodedata
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

# What makes a number part of a larger expression: _LEFT ends before it, _RIGHT begins after it.
_OPERAND = r"(?:[\d)\]}%!]|(?<![A-Za-z])[A-Za-z])[\s$]*"  # a number, a bracket, a variable
_OPEN = r"[\s$({\[]*$"
_VARIABLE = r"[b-zB-HJ-Z](?![A-Za-z'])"  # no a or I, which are words
_UNITS = "cdghlmpstCFJLNVW"  # of one letter
_SIGNS = r"×÷·⋅∙∗•"  # of products
_FUNCTIONS = r"log|ln|lg|exp|sin|cos|tan|sqrt"
_WORDS = r"mod|choose"
_SCALES = r"(?:hundred|thousand|million|billion|trillion)s?"
_BESIDE_COMMANDS = (  # of LaTeX, that may stand beside a number by itself
    r"(?:approx|sim|simeq|cong|equiv|neq?|leq?|geq?|lt|gt|in|to|(?:long)?[rR]ightarrow|Longrightarrow|implies|iff"
    r"|therefore|because|quad|qquad|colon|dots|ldots|cdots|item|newline|par|hline|hspace|vspace|begin|end|boxed|fbox"
    r"|degree|square|blacksquare|qed|checkmark|n|r|t)(?![A-Za-z])"
)
_LEFT = re.compile(
    "|".join(
        (
            rf"[\^√∛∜±∓∑∏∫∞]{_OPEN}",
            rf"{_OPERAND}(?:\*\*|[-+*/{_SIGNS}]|\\(?:times|cdot|div|pm|mp|ast|bmod|mod)){_OPEN}",
            rf"{_OPERAND}\b(?:x|{_WORDS}|times|plus|minus|divided by|multiplied by|to the power of)\b{_OPEN}",
            rf"\\(?!{_BESIDE_COMMANDS})[A-Za-z]+\s*(?:\[[^\]]*\])?(?:_\s*(?:\{{[^{{}}]*\}}|\w))?{_OPEN}",
            rf"\b(?:{_FUNCTIONS})(?:_\w+)?{_OPEN}",
            r"\}\s*\{\s*$",  # the second argument of a command
            r"[\w)\]}]\((?:[^()]*,)?[\s$]*$",  # of a function, or a product
            r"[(\[]\s*(?:[-+]?[\d./]+\s*,\s*)+$",  # a tuple or an interval
            r"\w_\{?$",
            r"-[({]$",
            r"\d[^\s\w=<>,;|≈→⇒]$",  # 5'000, 10:30
            r"\d\s+:\s*$",
        )
    )
)
_SUBTRAHEND = re.compile(rf"{_OPERAND}$|[-+]\s*$")
_RIGHT = re.compile(
    "|".join(
        (
            rf"[\s$]*(?:\^|[√π±∓∞{_SIGNS}]|\\(?!{_BESIDE_COMMANDS})[A-Za-z]|/\s*[\d(\\])",
            rf"[\s$]*[-+*][\s$]*{_VARIABLE}|[\s$]*/[\s$]*(?![{_UNITS}]){_VARIABLE}",
            rf"\s?[xyzn](?![A-Za-z'-])|(?![{_UNITS}])[A-Za-z](?![A-Za-z])|[α-ωΑ-Ψ](?![A-Za-z])",
            rf"\s?(?:pi|{_FUNCTIONS}|{_WORDS})\b|\s+{_SCALES}\b",
            r"[\u2070-\u209c\u00b2\u00b3\u00b9]",  # exponents and indices
            r"\((?![A-Za-z]{2})|_[\w{]",
        )
    )
)
_WORD = re.compile(r"[A-Za-z]{2,}[:,]?\s+[*$]*$")  # before a number after which `!` is no factorial
_CONTEXT = 60  # characters before a number that are looked at

_PART = r"(?:\{\s*(-?(?:\d+(?:\.\d+)?|\.\d+))\s*\}|(\d))"  # numerator or denominator
_FRACTION = re.compile(rf"\\[cdt]?frac\s*{_PART}\s*{_PART}")
_STYLE = r"\\(?:text|mathrm|textbf|mathbf|textit|mathit|textrm|mbox|emph|underline)\s*"
_SIZES = "displaystyle|bf|it|rm|small|large|Large|LARGE|huge|Huge"
_LATEX = (
    (re.compile(rf"{_STYLE}\{{\s*({_SCALES})\s*\}}"), r" \1 "),
    (re.compile(rf"{_STYLE}\{{[^{{}}\d]*\}}|\^\s*+(?:\{{\s*+)?\\circ\s*+\}}?"), " "),
    (re.compile(rf"{_STYLE}\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(rf"\\(?:left|right|{_SIZES})(?![A-Za-z])|\\(?:text)?color\s*\{{[^{{}}]*\}}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,]"), ""),  # thin spaces: 1\,000
    (re.compile(r"\\[ ;:]|~"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\N{EN DASH}(?=\$?[\d.])|(?<=\d)\s{0,3}\N{EN DASH}(?=\s{0,3}\$?\d)"), "-"),  # elsewhere it is a dash
)
_CHARACTERS = dict.fromkeys(map(ord, "\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\uff0d"), "-")
_CHARACTERS |= {
    code: " " + unicodedata.normalize("NFKC", chr(code)).replace("\N{FRACTION SLASH}", "/")
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))  # ½, ⅔ ..
}
_CHARACTERS[ord("\N{FRACTION SLASH}")] = "/"
_MARK = re.compile(r"####|^[ \t]*[*_]*(?:A|(?:Final )?[Aa]nswer)[*_]*:", re.MULTILINE)
_BESIDE = re.compile(r"[A-Za-z\s$%€£¥°=:.,*]*")  # what may stand beside the number of a box: units and a name
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


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
    """The content of the last `\\boxed{}` or `\\fbox{}` (to the end of the text if it is never closed), else None."""
    start = None
    for mark in _BOX.finditer(text):
        start = mark.end()
    if start is None:
        return None
    rest = text[start:]
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
    left = text[: found[0].start].rstrip()
    right = text[found[0].end :].lstrip()
    enclosed = left[-1:] + right[:1] in ("()", "{}")
    left, right = (left[:-1], right[1:]) if enclosed else (left, text[found[0].end :])
    beside = _BESIDE.fullmatch(left) and _BESIDE.fullmatch(right) and not right[:1].isalpha()
    return _alone(text, found[0]) if beside else None


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
    after = text[number.end : number.end + 1]
    is_right_part = _LEFT.search(before) or (number.signed and _SUBTRAHEND.search(before))
    is_factorial = after == "!" and not _WORD.search(before)
    is_left_part = is_factorial or (after == "|" == before[-1:]) or _RIGHT.match(text, number.end)
    return None if is_right_part or is_left_part else number.value


def _plain(text: str) -> str:
    """`text` without the LaTeX that formats a number, with fractions as 1/2 and minus signs as hyphens."""
    text = _FRACTION.sub(_written, text.translate(_CHARACTERS))
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _written(fraction: re.Match) -> str:
    """A fraction of LaTeX as p/q; as it is where the denominator is 0."""
    top, bottom = (Fraction(fraction[1] or fraction[2]), Fraction(fraction[3] or fraction[4]))
    if bottom == 0:
        return fraction[0]
    value = top / bottom
    return f" {value.numerator}/{value.denominator}"


def _fraction(match: re.Match) -> Fraction | None:
    if len(match[0]) > MAX_CHARACTERS:
        return None
    top = Fraction(re.sub(rf"[,{_SPACE}]", "", match["top"]) + (match["power"] or ""))
    bottom = int((match["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    return (-top if match["sign"] else top) / bottom
