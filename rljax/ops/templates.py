"""Texts with names of columns in braces, as `str.format` reads them; {{ and }} write a brace."""

import math
import string
from collections.abc import Mapping
from typing import Any


def names_in(template: str, what: str) -> list[str]:
    """What stands in braces. Raises ValueError, beginning with `what`, where the template does not parse.

    >>> names_in("{question} Put it in {{}}.", "the template")
    ['question']
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{what} does not parse ({error}); {{{{ and }}}} write a brace") from None


def fill(template: str, columns: Mapping[str, Any], what: str) -> str:
    """The template with the values of its columns.

    Raises ValueError, beginning with `what`, where it does not fit them; and for a column that is null or holds neither
    text nor a finite number, since what Python writes for it (None, nan) is no text that anybody meant.

    >>> fill("{question}: {n}", {"question": "How many", "n": 3}, "the template")
    'How many: 3'
    """
    try:
        values = {name: string.Formatter().get_field(name, (), columns)[0] for name in names_in(template, what)}
        written = template.format_map(columns)
    except (LookupError, AttributeError, ValueError, TypeError) as error:
        legal = ", ".join(sorted(columns))
        raise ValueError(f"{what} does not fit ({error}); legal in braces: {legal}") from None
    for name, value in values.items():
        if not is_text_or_number(value):
            raise ValueError(f"column {name!r} is {shown_value(value)}; legal in a template: text and numbers")
    return written


def is_text_or_number(value: Any) -> bool:
    """Whether a value of JSON is written as people would write it."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def shown_value(value: Any) -> str:
    """null, nan, or the type of a value that is neither text nor a number."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, float) else f"a {type(value).__name__}"
