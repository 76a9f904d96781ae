"""The page of compare.py: a table and learning curves for each task."""

import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.common.pictures import learning_curves
from rljax.train.log import write_atomically

LINES = 5  # in a picture
SEEDS_OF_A_RANKING = 3  # with fewer an algorithm's place is chance


def write_page(page: Path, results: list[dict], explanation: str) -> None:
    """The page, and beside it a folder of its name with the pictures. explanation: what is compared."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks_of(results):
        rows = [result for result in results if result["task"] == task]
        for name, content in pictures(task, rows).items():
            write_atomically(folder / name, content)
    write_atomically(page, results_page(results, folder.name, explanation))


def pictures(task: str, rows: list[dict]) -> dict[str, str]:
    """File name -> learning curves of five algorithms, the best first: means over seeds, 95 % intervals."""
    steps = [step for step, _ in rows[0]["curve"]]
    names = list(by_median(rows))
    found = {}
    for start, file in zip(range(0, len(names), LINES), picture_names(task, rows), strict=True):
        runs = {}
        for name in names[start : start + LINES]:
            runs[name] = np.array([[y for _, y in row["curve"]] for row in rows if row["algorithm"] == name])
        title = f"{task}: places {start + 1} to {start + len(runs)}"
        found[file] = learning_curves(title, steps, runs, "eval accuracy", "steps")
    return found


def picture_names(task: str, rows: list[dict]) -> list[str]:
    """The files of `pictures`."""
    count = math.ceil(len({row["algorithm"] for row in rows}) / LINES)
    return [f"{task}-{number}.svg" for number in range(1, count + 1)]


def by_median(rows: list[dict]) -> dict[str, float]:
    """The median of what each algorithm reached with the seeds that all have run, the best first."""
    names = dict.fromkeys(row["algorithm"] for row in rows)
    shared = shared_seeds(rows)
    reached = {
        name: statistics.median(row["after"] for row in rows if row["algorithm"] == name and row["seed"] in shared)
        for name in names
    }
    return dict(sorted(reached.items(), key=lambda item: (-item[1], item[0])))


def shared_seeds(rows: list[dict]) -> list[int]:
    """The seeds with which every algorithm has run. Raises ValueError where there is none."""
    seeds_of: dict[str, set[int]] = {}
    for row in rows:
        seeds_of.setdefault(row["algorithm"], set()).add(row["seed"])
    shared = sorted(set.intersection(*seeds_of.values()))
    if not shared:
        raise ValueError(f"no seed has run with all of {', '.join(seeds_of)}; legal: --algorithms that share one")
    return shared


def tasks_of(results: list[dict]) -> list[str]:
    return list(dict.fromkeys(result["task"] for result in results))


def results_page(results: list[dict], folder: str, explanation: str) -> str:
    """Markdown: a table for each task, algorithms by the median of what they reached. folder: of the pictures."""
    lines = ["# Results", "", "Written by `python experiments/tables/compare.py`; do not edit.", "", explanation, ""]
    for task in tasks_of(results):
        rows = [result for result in results if result["task"] == task]
        lines += task_section(task, rows)
        lines += [f"![eval accuracy after so many steps]({folder}/{name})" for name in picture_names(task, rows)]
        lines.append("")
    jax_of_commit = {result["git"].rstrip("+"): result["jax"] for result in results if result["git"]}
    commits = ", ".join(jax_of_commit)
    versions = ", ".join(dict.fromkeys(jax_of_commit.values()))
    lines.append(f"Commits and jax of the runs: {commits}; {versions}.")
    return "\n".join(lines) + "\n"


def few_seeds(rows: list[dict]) -> list[str]:
    """What to say before the table of one task where an algorithm has run with too few seeds to be ranked."""
    counts = Counter(row["algorithm"] for row in rows)
    few = sum(count < SEEDS_OF_A_RANKING for count in counts.values())
    if not few:
        return []
    return [
        f"The order says nothing yet: {few} of {len(counts)} algorithms have fewer than {SEEDS_OF_A_RANKING} seeds.",
        "",
    ]


def task_section(task: str, rows: list[dict]) -> list[str]:
    """The lines of one task. rows: its results."""
    seeds = sorted({row["seed"] for row in rows})
    before_of_seed = {row["seed"]: row["before"] for row in rows}
    before = ", ".join(f"{accuracy:.3f}" for accuracy in before_of_seed.values())
    median = by_median(rows)
    heading = "median of seeds " + ", ".join(map(str, shared_seeds(rows)))
    lines = [
        f"## {task}",
        "",
        f"{rows[0]['steps']} steps; eval accuracy after the warm-up, by seed: {before}.",
        "",
        "| algorithm | " + " | ".join(f"seed {seed}" for seed in seeds) + f" | seeds | {heading} | longest run, s |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    lines[4:4] = few_seeds(rows)
    for name in median:
        found = {row["seed"]: row for row in rows if row["algorithm"] == name}
        cells = [f"{found[seed]['after']:.3f}" if seed in found else "" for seed in seeds]
        longest = max(row["seconds"] for row in found.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(found)} | {median[name]:.3f} | {longest:.0f} |")
    return [*lines, ""]
