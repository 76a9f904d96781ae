"""Figures as SVG text, without a plotting library: learning curves, mazes, frames of CartPole; and a report of them."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from rljax.train.comparison import mean_and_interval
from rljax.train.log import write_atomically

GRID = (0, 0.25, 0.5, 0.75, 1)  # shares of a frame at which numbers stand
COLORS = ("#3366cc", "#cc5533", "#2f8f5b", "#8a5bc2", "#b08d1e")
ACTION_DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # up, down, left, right, as x and y on the page
TITLE_HEIGHT = 30
STYLE = "body{font:14px sans-serif;max-width:760px;margin:2em auto}td,th{padding:2px 12px;text-align:right}"


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A figure of these elements on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{width:g}" height="{height:g}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, anchor: str = "middle", **attributes) -> str:
    """A text element; further attributes with _ for -."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def title_text(title: str, x: float = 4) -> str:
    return text(x, 18, title, "start", font_weight="bold")


def confidence_interval(runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and the 95 % confidence interval of that mean, by Student's t.

    Args: runs: [seeds points]. Returns: mean, lower and upper bound, [points] each; all the same for one seed.
    """
    mean, low, high = mean_and_interval(np.asarray(runs, float))
    return (mean, mean, mean) if low is None else (mean, low, high)


def grid(
    frame: tuple[float, float, float, float], x_numbers: Sequence[str], y_numbers: Sequence[str], label: str
) -> list[str]:
    """Lines across a frame (left, top, width, height) with the numbers of its axes, which stand at GRID of it."""
    left, top, width, height = frame
    parts = []
    for share, x_number, y_number in zip(GRID, x_numbers, y_numbers, strict=True):
        y = top + height * (1 - share)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, y_number, "end"))
        parts.append(text(left + width * share, top + height + 16, x_number))
    return [*parts, text(left + width / 2, top + height + 34, label)]


def learning_curves(
    title: str,
    steps: Sequence[float],
    runs: Mapping[str, np.ndarray],
    y_label: str = "return",
    x_label: str = "steps of the environment",
) -> str:
    """For each method a line: the mean over its seeds, in its 95 % confidence interval. Each seed is a faint line.

    Args: steps: [points]. runs: method -> [seeds points].
    """
    left, top, width, height = 60, TITLE_HEIGHT, 520, 260
    runs = {name: np.asarray(values, float) for name, values in runs.items()}
    highest = max(values.max() for values in runs.values())
    lowest = min(values.min() for values in runs.values())
    lowest = 0.0 if 0 <= lowest < 0.1 * highest else lowest
    y_range = max(highest - lowest, 1e-9)
    last_step = max(float(steps[-1]), 1e-9)

    def points(values) -> list[str]:
        values = np.clip(values, lowest, highest)
        return [
            f"{left + width * step / last_step:.1f},{top + height * (1 - (value - lowest) / y_range):.1f}"
            for step, value in zip(steps, values, strict=True)
        ]

    parts = [title_text(title, left)]
    x_numbers = [f"{share * last_step:,.0f}" for share in GRID]
    y_numbers = [f"{lowest + share * y_range:.4g}" for share in GRID]
    parts += grid((left, top, width, height), x_numbers, y_numbers, f"{x_label}; {y_label}")
    for n, (name, values) in enumerate(runs.items()):
        color = COLORS[n % len(COLORS)]
        mean, low, high = confidence_interval(values)
        band = " ".join(points(low) + points(high)[::-1])
        parts.append(f'<polygon points="{band}" fill="{color}" opacity="0.2"/>')
        for run in values:
            parts.append(f'<polyline points="{" ".join(points(run))}" fill="none" stroke="{color}" opacity="0.25"/>')
        parts.append(f'<polyline points="{" ".join(points(mean))}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(text(left + width + 8, top + 14 + 18 * n, name, "start", fill=color))
    return svg(left + width + 120, top + height + 44, parts)


def draw_maze(title: str, walls, terminal, rewards, q, visits) -> str:
    """Each cell with max_a Q, an arrow for each best action, and its number of visits: the more, the bluer.

    Args: walls, terminal, rewards: [rows columns]. q, visits: [rows · columns, 4], actions up, down, left, right.
    """
    walls, terminal, rewards, q = (np.asarray(x) for x in (walls, terminal, rewards, q))
    visits = np.asarray(visits).sum(axis=1)
    rows, columns = walls.shape
    size = 90
    parts = [title_text(title)]
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        x = column * size
        y = TITLE_HEIGHT + row * size
        center = x + size / 2
        fill = "#444" if walls[row, column] else "#3366cc"
        opacity = 1.0 if walls[row, column] else 0.6 * visits[cell] / max(visits.max(), 1)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{fill}" fill-opacity="{opacity:.3f}"'
            ' stroke="#888"/>'
        )
        if walls[row, column]:
            continue
        if terminal[row, column]:
            color = "#2f8f5b" if rewards[row, column] > 0 else "#cc3333"
            parts.append(text(center, y + size / 2 + 5, f"{rewards[row, column]:+g}", font_size=22, fill=color))
            continue
        parts.append(text(center, y + size - 20, f"{q[cell].max():.2f}"))
        parts.append(text(center, y + size - 6, f"{int(visits[cell]):,} visits", font_size=9, fill="#555"))
        for (dx, dy), value in zip(ACTION_DIRECTIONS, q[cell], strict=True):
            if value >= q[cell].max() - 1e-3:
                parts.append(arrow(center, y + 32, 20 * dx, 20 * dy))
    return svg(columns * size + 2, TITLE_HEIGHT + rows * size + 2, parts)


def arrow(x: float, y: float, dx: float, dy: float) -> str:
    """An arrow from (x, y) to (x + dx, y + dy)."""
    tip = (x + dx, y + dy)
    left, right = ((x + 0.6 * dx + side * dy, y + 0.6 * dy - side * dx) for side in (0.3, -0.3))
    head = " ".join(f"{a:.1f},{b:.1f}" for a, b in (tip, left, right))
    line = f'<path d="M{x:.1f} {y:.1f}l{dx:.1f} {dy:.1f}" stroke="#222" stroke-width="2"/>'
    return f'{line}<polygon points="{head}" fill="#222"/>'


def draw_cartpole(title: str, states, times: Sequence[int], x_limit: float = 2.4) -> str:
    """Frames side by side, one for each of `states` [frames 4]: position, velocity, angle, angular velocity."""
    size = 110
    parts = [title_text(title)]
    for n, ((position, _, angle, _), time) in enumerate(zip(np.asarray(states, float), times, strict=True)):
        x = n * size
        ground = TITLE_HEIGHT + size - 26
        cart = x + size / 2 + position / x_limit * (size / 2 - 14)
        tip_x = cart + 55 * math.sin(angle)
        tip_y = ground - 10 - 55 * math.cos(angle)
        parts += [
            f'<rect x="{x}" y="{TITLE_HEIGHT}" width="{size}" height="{size}" fill="none" stroke="#bbb"/>',
            f'<path d="M{x} {ground + 2}h{size}" stroke="#888"/>',
            f'<rect x="{cart - 12:.1f}" y="{ground - 10}" width="24" height="12" fill="#444"/>',
            f'<path d="M{cart:.1f} {ground - 10}L{tip_x:.1f} {tip_y:.1f}" stroke="#cc5533" stroke-width="4"/>',
            text(x + size / 2, ground + 18, f"t = {time}", font_size=10),
        ]
    return svg(len(times) * size, TITLE_HEIGHT + size, parts)


def write_report(
    directory: str | Path, title: str, rows: Sequence[Mapping], figures: Mapping[str, str], settings: Mapping
) -> None:
    """Write each figure as NAME.svg, and report.html: a table of the rows, the figures, the settings."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_atomically(directory / f"{name}.svg", figure)
    write_atomically(directory / "report.html", report_html(title, rows, list(figures.values()), settings))


def report_html(title: str, rows: Sequence[Mapping], figures: Sequence[str], settings: Mapping) -> str:
    """One file that needs no server and no network."""
    table = [table_row(rows[0], "th")]
    table += [table_row(row.values(), "td") for row in rows]
    body = "\n".join(table)
    numbers = {name: float(x) if hasattr(x, "dtype") else x for name, x in settings.items()}
    given = ", ".join(f"{name} {format_cell(x)}" for name, x in numbers.items())
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>\n'
        f"<h1>{escape(title)}</h1>\n<table>\n{body}\n</table>\n"
        + "\n".join(f"<p>{figure}</p>" for figure in figures)
        + f"\n<p>{escape(given)}</p>\n"
    )


def table_row(cells, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(format_cell(cell))}</{tag}>" for cell in cells) + "</tr>"


def format_cell(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)
