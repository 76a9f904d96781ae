"""How tables are written; and those of prompts, KL estimators and credit. The words between them stand in page.md."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from exact import credit, divergences
from exact.gradients import compare, objectives
from exact.language import Tree
from exact.worlds import World, coin


def digits(x) -> str:
    """Three that count; whole numbers without any."""
    if isinstance(x, str):
        return x
    if not np.isfinite(x):
        return "–"
    if abs(x - round(x)) < 1e-8:
        return str(round(x))
    return f"{float(f'{x:.3g}'):,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def closeness(x: float) -> str:
    """A cosine or a correlation: 1 only where it is one."""
    if not np.isfinite(x) or abs(x) < 1e-8:
        return "0" if np.isfinite(x) else "–"
    return f"{round(x)}" if abs(abs(x) - 1) < 1e-9 else f"{np.sign(x) * min(abs(x), 0.9994):.3f}"


def markdown(rows: list[Mapping]) -> str:
    """A table; rows that differ in their first cell alone become one."""
    merged: dict[tuple, list] = {}
    for name, *cells in (map(digits, row.values()) for row in rows):
        merged.setdefault(tuple(cells), []).append(name)
    lines = [list(rows[0]), ["---"] + ["--:"] * (len(rows[0]) - 1)]
    lines += [["; ".join(sorted(names)), *cells] for cells, names in merged.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(parts: Mapping[str, object]) -> str:
    """page.md with {{name}} replaced by the part of that name."""
    page = (Path(__file__).parent / "page.md").read_text()
    return re.sub(r"\{\{(\S+)\}\}", lambda hit: str(parts[hit[1]]), page)


def prompts(lm: Tree, found: Mapping, chances: tuple[float, ...]) -> str:
    """What ∇p is multiplied by on a prompt whose one-token answers are right with probability p."""
    truths = [objectives(lm, coin(p), 2)["J"] for p in chances]
    rows = []
    for name, (mean, _) in found.items():
        scales = [compare(g[0], truth)["scale"] for g, truth in zip(mean, truths, strict=True)]
        rows.append({"algorithm": name} | {f"p = {p}": x for p, x in zip(chances, scales, strict=True)})
    return markdown(rows)


def divergence(lm: Tree, near: World, far: World) -> str:
    on, off = divergences.distances(lm, near), divergences.distances(lm, far)
    short = lm.mask.shape[1] == 1  # then all three targets are of one decision
    rows = []
    for name in on:
        columns = [c for c in on[name] if not short or "answers" not in c]
        pairs = {f"{c}, {where}": x[name][c] for c in columns for where, x in (("on-policy", on), ("off-policy", off))}
        rows.append({"estimator": name} | {k.replace(" at visits", "") if short else k: v for k, v in pairs.items()})
    return markdown(rows)


def outcome(lm: Tree, world: World, binary: World) -> str:
    first, second = credit.by_outcome(lm, world), credit.by_outcome(lm, binary)
    kinds = {"": first, ", rewards 0 or 1": second}
    rows = [
        {"credit": name}
        | {k + kind: closeness(found[name][k]) for kind, found in kinds.items() for k in ("one", "mean")}
        for name in sorted(first, key=lambda name: -first[name]["one"])
    ]
    return markdown(rows)


def critic(lm: Tree, world: World) -> str:
    rows = [
        {"critic": name} | {f"{k}, λ = {lam}": closeness(x[k]) for lam, x in found.items() for k in ("one", "mean")}
        for name, found in credit.by_critic(lm, world).items()
    ]
    return markdown(rows)
