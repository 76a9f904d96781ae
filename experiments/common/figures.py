"""What the figures of the notebooks share, drawn by matplotlib (the `notebooks` extra)."""

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

from experiments.common.pictures import COLORS, confidence_interval

INK = "#333333"
GREY = "#777777"
LINES = ("-", "--", "-.", ":", (0, (5, 1)))  # with the colors: lines that differ in both

# The corners of a cell's four triangles around its center, for up, down, left and right; y points down, as rows do.
TRIANGLES = (
    ((-0.5, -0.5), (0.5, -0.5)),
    ((-0.5, 0.5), (0.5, 0.5)),
    ((-0.5, -0.5), (-0.5, 0.5)),
    ((0.5, -0.5), (0.5, 0.5)),
)
NUMBER_PLACES = ((0.0, -0.33), (0.0, 0.33), (-0.3, 0.0), (0.3, 0.0))


def use_style() -> None:
    """Small figures, dark on white: a light page and a dark one both leave them readable."""
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "figure.figsize": (6.4, 3.4),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "grid.color": "#e2e2e2",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
        }
    )


def plot_with_interval(axes: Axes, x, runs, label: str) -> None:
    """The mean over runs [seeds points] against x [points], and its 95 % confidence interval (Student's t)."""
    mean, low, high = confidence_interval(runs)
    (line,) = axes.plot(x, mean, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_action_values(axes: Axes, title: str, maze, q, limit: float = 10.0) -> None:
    """A maze with the four action values of each cell, the best in bold: values and greedy policy in one picture.

    Args: maze: `rljax.envs.maze.Maze`. q: [rows · columns, 4], actions up, down, left, right. limit: of the colors,
    from red at its negative to blue.
    """
    walls, ends, rewards, q = (np.asarray(x) for x in (maze.walls, maze.ends, maze.rewards, q))
    rows, columns = walls.shape
    colors = plt.get_cmap("RdBu")
    for cell, (row, column) in enumerate(np.ndindex(rows, columns)):
        if walls[row, column] or ends[row, column]:
            color = GREY if walls[row, column] else colors(0.5 + 0.5 * np.sign(rewards[row, column]))
            axes.fill(
                column + np.array([-0.5, 0.5, 0.5, -0.5]),
                row + np.array([-0.5, -0.5, 0.5, 0.5]),
                color=color,
                linewidth=0,
            )
            if ends[row, column]:
                name = "goal" if rewards[row, column] > 0 else "trap"
                axes.text(column, row, f"{name}\n{rewards[row, column]:+g}", color="white", ha="center", va="center")
            continue
        for corners, place, value in zip(TRIANGLES, NUMBER_PLACES, q[cell], strict=True):
            x, y = np.array([(0.0, 0.0), *corners]).T
            axes.fill(column + x, row + y, color=colors(0.5 + 0.35 * np.clip(value / limit, -1, 1)), linewidth=0)
            best = value >= q[cell].max() - 1e-3
            axes.text(
                column + place[0],
                row + place[1],
                f"{round(float(value), 2):g}",
                ha="center",
                va="center",
                fontsize=9,
                color="black",
                fontweight="bold" if best else "normal",
            )
    axes.set(title=title, xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    axes.set(xticks=range(columns), yticks=range(rows), xlabel="column", ylabel="row")
    axes.grid(False)
    for edge in range(1, max(rows, columns)):
        axes.axvline(edge - 0.5, color="white", linewidth=2)
        axes.axhline(edge - 0.5, color="white", linewidth=2)
