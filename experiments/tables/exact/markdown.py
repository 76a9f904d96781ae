"""Numbers, tables and pages in Markdown."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def format_number(x) -> str:
    """Three significant digits; integers without any after the point; – for NaN and infinity; strings as they are."""
    if isinstance(x, str):
        return x
    if not np.isfinite(x):
        return "–"
    if abs(x - round(x)) < 1e-8:
        return str(round(x))
    return f"{float(f'{x:.3g}'):,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def format_correlation(x: float) -> str:
    """A cosine or a correlation in three decimals; 1 and 0 only where it is 1 or 0, to 1e-9 and 1e-8."""
    if not np.isfinite(x):
        return "–"
    if abs(x) < 1e-8:
        return "0"
    if abs(abs(x) - 1) < 1e-9:
        return str(round(x))
    return f"{np.sign(x) * min(abs(x), 0.9994):.3f}"


def markdown_table(rows: list[Mapping]) -> str:
    """A table with the keys of the first row as its header. Rows that differ in their first cell alone become one."""
    merged: dict[tuple, list] = {}
    for row in rows:
        name, *cells = map(format_number, row.values())
        merged.setdefault(tuple(cells), []).append(name)
    lines = [list(rows[0]), ["---"] + ["--:"] * (len(rows[0]) - 1)]
    lines += [["; ".join(sorted(names)), *cells] for cells, names in merged.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_page(template: Path, parts: Mapping[str, object]) -> str:
    """The template with each {{name}} replaced by the part of that name."""
    return re.sub(r"\{\{(\S+)\}\}", lambda match: str(parts[match[1]]), template.read_text())
