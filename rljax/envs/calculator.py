"""A calculator that evaluates arithmetic, and nothing else: exact, and bounded in time and size."""

import ast
import operator
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
LEGAL = "legal: numbers, + - * / // % ** and parentheses"


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, as in (3 + 4) * 2.
    """
    value = evaluate_arithmetic(expression)
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def evaluate_arithmetic(expression: str) -> Fraction:
    """The exact value. Raises ValueError for anything but arithmetic, and for what is too long or too large."""
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression is a text of at most {MAX_CHARACTERS} characters")
    cleaned = expression.replace(",", "").replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    try:
        tree = ast.parse(cleaned.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic; {LEGAL}") from None
    return _value(tree.body)


def _value(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(_exact(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            divisor = _value(right)
            if divisor == 0 and not isinstance(op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            return _bounded(Fraction(OPERATIONS[type(op)](_value(left), divisor)))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic; {LEGAL}")


def _exact(number: int | float) -> Fraction:
    try:
        return Fraction(str(number))  # 0.1 is a tenth
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
