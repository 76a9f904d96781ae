"""The page of compare.py: a table, and learning curves."""

import math
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.common.pictures import learning_curves
from rljax.train.comparison import mean_and_interval
from rljax.train.log import write_atomically

LINES = 5  # in a picture
SEEDS_OF_A_RANKING = 3  # with fewer an algorithm's place is chance
BASELINE = "grpo"  # what each method is compared with, seed by seed


def write_page(page: Path, results: list[dict], explanation: str) -> None:
    """The page, and beside it a folder of its name with the pictures. explanation: what is compared."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures(results).items():
        write_atomically(folder / name, content)
    write_atomically(page, results_page(results, folder.name, explanation))


def pictures(results: list[dict]) -> dict[str, str]:
    """File name -> learning curves of five algorithms, the best first: means over seeds, 95 % intervals."""
    steps = [step for step, _ in results[0]["curve"]]
    names = list(by_median(results))
    found = {}
    for start, file in zip(range(0, len(names), LINES), picture_names(results), strict=True):
        runs = {}
        for name in names[start : start + LINES]:
            runs[name] = np.array([[y for _, y in row["curve"]] for row in results if row["algorithm"] == name])
        title = f"places {start + 1} to {start + len(runs)}"
        found[file] = learning_curves(title, steps, runs, "eval accuracy", "steps")
    return found


def picture_names(results: list[dict]) -> list[str]:
    """The files of `pictures`."""
    count = math.ceil(len({row["algorithm"] for row in results}) / LINES)
    return [f"sortings-{number}.svg" for number in range(1, count + 1)]


def by_median(results: list[dict]) -> dict[str, float]:
    """The median of what each algorithm reached with the seeds that all have run, the best first."""
    shared = shared_seeds(results)
    reached = {}
    for name in dict.fromkeys(row["algorithm"] for row in results):
        accuracy = by_seed(results, name)
        reached[name] = statistics.median(accuracy[seed] for seed in shared)
    return dict(sorted(reached.items(), key=lambda item: (-item[1], item[0])))


def by_seed(results: list[dict], name: str) -> dict[int, float]:
    """Seed -> the accuracy that the algorithm ended with."""
    return {row["seed"]: row["after"] for row in results if row["algorithm"] == name}


def shared_seeds(results: list[dict]) -> list[int]:
    """The seeds with which every algorithm has run. Raises ValueError where there is none."""
    seeds_of: dict[str, set[int]] = {}
    for row in results:
        seeds_of.setdefault(row["algorithm"], set()).add(row["seed"])
    shared = sorted(set.intersection(*seeds_of.values()))
    if not shared:
        raise ValueError(f"no seed has run with all of {', '.join(seeds_of)}; legal: --algorithms that share one")
    return shared


def difference(results: list[dict], name: str) -> tuple | None:
    """What the algorithm reached less what the baseline did, over the seeds of both: mean, ends of its 95 % interval.

    The ends are None of a single seed. None for the baseline itself, and where no seed has run with both.
    """
    reached, baseline = by_seed(results, name), by_seed(results, BASELINE)
    differences = [reached[seed] - baseline[seed] for seed in sorted(reached.keys() & baseline.keys())]
    if name == BASELINE or not differences:
        return None
    return mean_and_interval(np.array(differences))


def shown_difference(found: tuple | None) -> str:
    """A cell of the table."""
    if found is None:
        return ""
    mean, low, high = found
    return f"{mean:+.3f}" if low is None else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def beyond_chance(results: list[dict]) -> list[str]:
    """How many algorithms differ from the baseline by more than their interval; nothing where there is no interval."""
    found = [difference(results, name) for name in dict.fromkeys(row["algorithm"] for row in results)]
    intervals = [(low, high) for _, low, high in filter(None, found) if low is not None]
    above, below = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
    counted = f"{above} lie above 0 with their whole interval, and {below} below"
    return [f"Of {len(intervals)} differences from {BASELINE}, {counted}.", ""] if intervals else []


def results_page(results: list[dict], folder: str, explanation: str) -> str:
    """Markdown: a table, algorithms by the median of what they reached. folder: of the pictures."""
    lines = ["# Results", "", "Written by `python experiments/tables/compare.py`; do not edit.", "", explanation, ""]
    lines += [f"{results[0]['steps']} steps; eval accuracy after the warm-up, by seed: {warm_ups(results)}.", ""]
    lines += few_seeds(results) or beyond_chance(results)
    lines += [*table_of_results(results), ""]
    lines += [f"![eval accuracy after so many steps]({folder}/{name})" for name in picture_names(results)]
    jax_of_commit = {result["git"].rstrip("+"): result["jax"] for result in results if result["git"]}
    commits = ", ".join(jax_of_commit)
    versions = ", ".join(dict.fromkeys(jax_of_commit.values()))
    lines += ["", f"Commits and jax of the runs: {commits}; {versions}."]
    return "\n".join(lines) + "\n"


def warm_ups(results: list[dict]) -> str:
    """What each seed's runs start from."""
    before = {row["seed"]: row["before"] for row in results}
    return ", ".join(f"{before[seed]:.3f}" for seed in sorted(before))


def few_seeds(results: list[dict]) -> list[str]:
    """What to say before the table where an algorithm has run with too few seeds to be ranked."""
    counts = Counter(row["algorithm"] for row in results)
    few = sum(count < SEEDS_OF_A_RANKING for count in counts.values())
    if not few:
        return []
    return [
        f"The order says nothing yet: {few} of {len(counts)} algorithms have fewer than {SEEDS_OF_A_RANKING} seeds.",
        "",
    ]


def table_of_results(results: list[dict]) -> list[str]:
    """A row for each algorithm, the best first."""
    seeds = sorted({row["seed"] for row in results})
    median = by_median(results)
    shared = ", ".join(map(str, shared_seeds(results)))
    columns = ["algorithm", *(f"seed {seed}" for seed in seeds), "seeds", f"median of seeds {shared}"]
    columns += [f"less {BASELINE}", "longest run, s"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in median:
        reached = by_seed(results, name)
        cells = [f"{reached[seed]:.3f}" if seed in reached else "" for seed in seeds]
        longest = max(row["seconds"] for row in results if row["algorithm"] == name)
        cells += [
            str(len(reached)),
            f"{median[name]:.3f}",
            shown_difference(difference(results, name)),
            f"{longest:.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
