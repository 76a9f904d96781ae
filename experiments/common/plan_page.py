"""A plan as one self-contained page, with a bar of memory a device for each program."""

from html import escape
from pathlib import Path
from typing import Any

from experiments.common import plan
from experiments.common.plan import Plan
from rljax.train.log import write_atomically

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .15rem .8rem; border-bottom: 1px solid #ddd }}
td {{ text-align: right; font-variant-numeric: tabular-nums }} td:first-child, td:last-child {{ text-align: left }}
.bar {{ position: relative; height: 1.6rem; background: #eee; margin: .3rem 0; display: flex }}
.bar i {{ display: block; height: 100% }}
.bar b {{ position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: #000 }}
.key i {{ display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }}
</style>
<h1>{title}</h1>
<p><strong>{verdict}</strong></p>
<p>{batch}</p>
<p>{cost}</p>
{body}
</html>
"""


def write(file: str, cfg: Any, found: Plan, swept: list[Plan]) -> None:
    """Write the page of a plan, with the meshes that were tried."""
    tables = [("Memory", plan.memory_rows(found)), ("A step, at the published peaks", plan.phase_rows(found))]
    if found.collectives:
        tables.append(("Collectives of a call", plan.collective_rows(found)))
    if swept:
        tables.append(("Meshes, by formulas", plan.sweep_rows(swept)))
    parts = [bars(found), *(f"<h2>{escape(title)}</h2>{html_table(rows)}" for title, rows in tables)]
    page = PAGE.format(
        title=escape(f"{cfg.model} on {found.topology.name}: {plan.layout(found)}"),
        verdict=escape(plan.verdict(found)),
        batch=escape(plan.batch_line(found)),
        cost=escape(plan.cost_line(found, cfg.steps, cfg.price)),
        body="\n".join(parts),
    )
    write_atomically(Path(file), page)


def bars(found: Plan) -> str:
    """A bar for each program: its arrays, and a mark at the device's memory."""
    limit = found.topology.chip.hbm_bytes
    full = max(limit, found.worst.total)
    names = list(dict.fromkeys(name for one in found.memory for name in one.arrays))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    out = ["<h2>Memory of a device</h2>"]
    for one in found.memory:
        pieces = [
            _piece(color[name], 100 * size / full, f"{name} {plan.gib(size)} GiB") for name, size in one.arrays.items()
        ]
        mark = f'<b style="left:{100 * limit / full:.2f}%" title="{plan.gib(limit)} GiB"></b>'
        out.append(f'{escape(one.program)}: {plan.gib(one.total)} GiB<div class="bar">{"".join(pieces)}{mark}</div>')
    key = "".join(f'<i style="background:{color[name]}"></i>{escape(name)}' for name in names)
    return "\n".join([*out, f'<p class="key">{key}</p>'])


def _piece(color: str, percent: float, title: str) -> str:
    return f'<i style="width:{percent:.2f}%;background:{color}" title="{escape(title)}"></i>'


def html_table(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = ["".join(f"<td>{escape(row.get(name, ''))}</td>" for name in names) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
