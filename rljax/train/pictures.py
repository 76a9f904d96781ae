"""Pictures as SVG text, without a plotting library: learning curves, mazes, CartPole in frames; a page of them."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from rljax.train.log import write_atomically

COLOURS = ("#3366cc", "#cc5533", "#2f8f5b", "#8a5bc2", "#b08d1e")
ARROWS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # up, down, left, right: x and y on the page


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{width:g}" height="{height:g}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, anchor: str = "middle", **style) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def interval(runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds of [seeds points], and a 95 % interval of the mean (Student's t; none of one seed)."""
    runs = np.asarray(runs, float)
    n = len(runs)
    mean = runs.mean(axis=0)
    if n < 2:
        return mean, mean, mean
    half = stdtrit(n - 1, 0.975) * runs.std(axis=0, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def curves(title: str, steps: Sequence[float], lines: Mapping[str, np.ndarray], y: str = "return") -> str:
    """One line a method: the mean over its seeds [seeds points] in the 95 % interval of the mean, each seed faintly."""
    left, top, wide, high = 60, 30, 520, 260
    every = [np.asarray(runs, float) for runs in lines.values()]
    low, top_value = min(x.min() for x in every), max(x.max() for x in every)
    low = 0.0 if 0 <= low < 0.1 * top_value else low
    span, reach = max(top_value - low, 1e-9), max(float(steps[-1]), 1e-9)

    def points(values) -> list[str]:
        values = np.clip(values, low, top_value)
        return [
            f"{left + wide * s / reach:.1f},{top + high * (1 - (v - low) / span):.1f}"
            for s, v in zip(steps, values, strict=True)
        ]

    parts = [text(left, 18, title, "start", font_weight="bold")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        height = top + high * (1 - share)
        parts.append(f'<path d="M{left} {height:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(text(left - 6, height + 4, f"{low + share * span:.4g}", "end"))
        parts.append(text(left + wide * share, top + high + 16, f"{share * reach:,.0f}"))
    parts.append(text(left + wide / 2, top + high + 34, f"steps of the environment; {y}"))
    for n, (name, runs) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        mean, under, over = interval(runs)
        band = points(under) + points(over)[::-1]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/>')
        for run in np.asarray(runs, float):
            parts.append(f'<polyline points="{" ".join(points(run))}" fill="none" stroke="{colour}" opacity="0.25"/>')
        line = " ".join(points(mean))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(left + wide + 8, top + 14 + 18 * n, name, "start", fill=colour))
    return svg(left + wide + 120, top + high + 44, parts)


def maze(title: str, walls, ends, rewards, q, visits) -> str:
    """Cell by cell: max_a Q, an arrow for each best action, how often the cell was left (the bluer, the oftener).

    Args: walls, ends, rewards: [rows columns]. q, visits: [rows · columns, 4], actions up, down, left, right.
    """
    walls, ends, rewards = (np.asarray(x) for x in (walls, ends, rewards))
    rows, columns = walls.shape
    q, visits = np.asarray(q), np.asarray(visits).sum(axis=1)
    size, top = 90, 30
    parts = [text(4, 18, title, "start", font_weight="bold")]
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        x, y = column * size, top + row * size
        shade = 0.6 * visits[cell] / max(visits.max(), 1)
        fill, opacity = ("#444", 1.0) if walls[row, column] else ("#3366cc", shade)
        parts.append(f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{fill}" fill-opacity="{opacity:.3f}"')
        parts[-1] += ' stroke="#888"/>'
        middle, centre = x + size / 2, y + size / 2
        if walls[row, column]:
            continue
        if ends[row, column]:
            colour = "#2f8f5b" if rewards[row, column] > 0 else "#cc3333"
            parts.append(text(middle, centre + 5, f"{rewards[row, column]:+g}", font_size=22, fill=colour))
            continue
        parts.append(text(middle, y + size - 20, f"{q[cell].max():.2f}"))
        parts.append(text(middle, y + size - 6, f"{int(visits[cell]):,} visits", font_size=9, fill="#555"))
        for (dx, dy), value in zip(ARROWS, q[cell], strict=True):
            if value >= q[cell].max() - 1e-3:
                parts.append(arrow(middle, y + 32, 20 * dx, 20 * dy))
    return svg(columns * size + 2, top + rows * size + 2, parts)


def arrow(x: float, y: float, dx: float, dy: float) -> str:
    """From (x, y) by (dx, dy)."""
    tip, left, right = ((x + dx, y + dy), *((x + 0.6 * dx + s * dy, y + 0.6 * dy - s * dx) for s in (0.3, -0.3)))
    head = " ".join(f"{a:.1f},{b:.1f}" for a, b in (tip, left, right))
    line = f'<path d="M{x:.1f} {y:.1f}l{dx:.1f} {dy:.1f}" stroke="#222" stroke-width="2"/>'
    return f'{line}<polygon points="{head}" fill="#222"/>'


def cartpole(title: str, physics, times: Sequence[int], edge: float = 2.4) -> str:
    """A strip of frames: cart and pole at each of `physics` [frames 4]."""
    size, top = 110, 30
    parts = [text(4, 18, title, "start", font_weight="bold")]
    for n, ((place, _, angle, _), time) in enumerate(zip(np.asarray(physics, float), times, strict=True)):
        x, ground = n * size, top + size - 26
        cart = x + size / 2 + place / edge * (size / 2 - 14)
        tip = cart + 55 * math.sin(angle), ground - 10 - 55 * math.cos(angle)
        parts += [
            f'<rect x="{x}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#bbb"/>',
            f'<path d="M{x} {ground + 2}h{size}" stroke="#888"/>',
            f'<rect x="{cart - 12:.1f}" y="{ground - 10}" width="24" height="12" fill="#444"/>',
            f'<path d="M{cart:.1f} {ground - 10}L{tip[0]:.1f} {tip[1]:.1f}" stroke="#cc5533" stroke-width="4"/>',
            text(x + size / 2, ground + 18, f"t = {time}", font_size=10),
        ]
    return svg(len(times) * size, top + size, parts)


def write(directory: str | Path, title: str, rows: Sequence[Mapping], shown: Mapping[str, str], settings: Mapping):
    """NAME.svg of each picture, and report.html: a table of the rows, the pictures, the settings."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in shown.items():
        write_atomically(directory / f"{name}.svg", picture)
    write_atomically(directory / "report.html", page(title, rows, list(shown.values()), settings))


def page(title: str, rows: Sequence[Mapping], shown: Sequence[str], settings: Mapping) -> str:
    """One file that opens from a disk."""

    def line(cells, tag: str = "td") -> str:
        words = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells)
        return "<tr>" + "".join(f"<{tag}>{escape(word)}</{tag}>" for word in words) + "</tr>"

    body = "\n".join([line(rows[0], "th"), *(line(row.values()) for row in rows)])
    numbers = {name: float(x) if hasattr(x, "dtype") else x for name, x in settings.items()}
    given = ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in numbers.items())
    style = "body{font:14px sans-serif;max-width:760px;margin:2em auto}td,th{padding:2px 12px;text-align:right}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>\n'
        f"<h1>{escape(title)}</h1>\n<table>\n{body}\n</table>\n"
        + "\n".join(f"<p>{picture}</p>" for picture in shown)
        + f"\n<p>{escape(given)}</p>\n"
    )
