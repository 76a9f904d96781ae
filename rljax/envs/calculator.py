"""A calculator that evaluates arithmetic, and nothing else: exact, and bounded in time and size.

A result is written with all its digits where these are at most 30, else rounded to 10 decimals; never with an exponent.
"""

import ast
import operator
import re
from decimal import Decimal, localcontext
from fractions import Fraction

MAX_CHARACTERS = 200  # of an expression
MAX_BITS = 256  # of numerator and denominator of every number on the way
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MAX_DIGITS = 30  # of a result that is written exactly
DECIMALS = 10  # of another one; as many digits where it is below 1
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
LEGAL = "legal: numbers, + - * / // % ** and parentheses"


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, as in (3 + 4) * 2.
    """
    return write_decimal(evaluate_arithmetic(expression))


def write_decimal(value: Fraction) -> str:
    """The number without an exponent.

    >>> write_decimal(Fraction(12345678901, 2)), write_decimal(Fraction(2, 3))
    ('6172839450.5', '0.6666666667')
    """
    if value.denominator == 1:
        return str(value.numerator)
    whole = abs(value.numerator) // value.denominator
    digits = DECIMALS + (len(str(whole)) if whole else 0)
    for precision in (MAX_DIGITS, digits):
        with localcontext(prec=precision):
            found = Decimal(value.numerator) / Decimal(value.denominator)
        if Fraction(found) == value:
            break
    return f"{found:f}"


def evaluate_arithmetic(expression: str) -> Fraction:
    """The exact value. Raises ValueError for anything but arithmetic, and for what is too long or too large."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression is a text of at most {MAX_CHARACTERS} characters")
    cleaned = THOUSANDS.sub(lambda found: found[0].replace(",", ""), expression)
    cleaned = cleaned.replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**").strip()
    try:
        tree = ast.parse(cleaned, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic; {LEGAL}") from None
    return _value(tree.body, cleaned)


def _value(node: ast.AST, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(_exact(number, ast.get_source_segment(source, node)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, source)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, source)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, source), _value(right, source))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            divisor = _value(right, source)
            if divisor == 0 and not isinstance(op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            return _bounded(Fraction(OPERATIONS[type(op)](_value(left, source), divisor)))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic; {LEGAL}")


def _exact(number: int | float, written: str) -> Fraction:
    try:
        return Fraction(written if written.isascii() and set(written) <= set("0123456789.") else str(number))
    except ValueError:  # 1e999 is infinite; a text of more than 4,300 digits is refused too
        raise ValueError("a number is too large") from None


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("the exponent of a power must be a whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * max(bits - 1, 0) > MAX_BITS or abs(exponent) > 10**6:
        raise ValueError("a power is too large")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"a number is too large; legal: up to 2**{MAX_BITS}")
    return value
