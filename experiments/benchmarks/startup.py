r"""How long it takes to import rljax, and until the first step of recipes: compiled, and from the compilation cache.

    python experiments/benchmarks/startup.py
    python experiments/benchmarks/startup.py --model DIR        # and experiments/grpo.py on a model directory

Imports are timed in processes of their own, which take turns. "rljax in use" has looked up what a first script does:
`import rljax` alone imports nothing else.

A recipe starts in an empty directory; its first step is over when the first line of its metrics.jsonl is there. The
first process finds an empty compilation cache, the others what it left there. A recipe that is compiled as a whole is
timed to its end.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks.common import Output, named, run, write_figures
from rljax.train.log import log_info, table

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = {
    "jax, flax, optax": "import jax, flax, optax",
    "rljax": "import rljax",
    "rljax in use": "import rljax; rljax.grpo, rljax.sample, rljax.policy_objective, rljax.make_update",
}


class Recipe(NamedTuple):
    """A command line, to which a directory is added, and the file there whose first line ends the time."""

    arguments: tuple[str, ...]
    first_line: str | None = "metrics.jsonl"  # None: the end of the process


RECIPES = {
    "arithmetic_grpo.py, first step of its warm-up": Recipe(("arithmetic_grpo.py",), "sft/metrics.jsonl"),
    # The target of the warm-up is reached at once: it measures, and learns nothing.
    "arithmetic_grpo.py, first step after it": Recipe(("arithmetic_grpo.py", "--sft_target", "0")),
    "control.py, PPO, 1 seed": Recipe(("control.py", "--seeds", "1"), None),
    "maze.py": Recipe(("maze.py",), None),
}


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Medians; `profile` keeps the statistics of cProfile of one start of each recipe with a filled cache."""

    imports: int = 7  # processes for each import
    repeats: int = 2  # processes for each recipe with a filled cache, after the one that fills it
    model: str = ""  # directory of a model for experiments/grpo.py
    recipes: tuple[str, ...] = tuple(RECIPES)  # which


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    recipes = {name: RECIPES[name] for name in cfg.recipes}
    if cfg.model:
        recipes["grpo.py"] = Recipe(grpo_arguments(cfg.model))
    lines = import_lines(cfg.imports)
    table("seconds", lines)
    figures = named(lines)
    lines = []
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as cache:
            cold = start(recipe, cache)
            warm = [start(recipe, cache) for _ in range(cfg.repeats)]
            if cfg.profile:
                start(recipe, cache, str(Path(cfg.profile).resolve() / f"{name}.prof"))
        lines.append({"": name, "empty cache, s": cold, "filled cache, s": statistics.median(warm)})
    log_info(f"to the first step, medians of {cfg.repeats}")
    table("seconds", lines)
    figures |= named(lines)
    write_figures(cfg.json, figures)
    return figures


def import_lines(repeats: int) -> list[dict]:
    """A row for each of IMPORTS: seconds of a process that does it and ends, beyond one that does nothing."""
    codes = {"": "pass", **IMPORTS}
    seconds = {name: [] for name in codes}
    for _ in range(repeats + 1):
        for name, code in codes.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first reads the disk
    beyond = {name: median[name] - median[""] for name in IMPORTS}
    base = beyond["jax, flax, optax"]
    return [{"": name, "import, s": value, "of jax, flax, optax": value / base} for name, value in beyond.items()]


def grpo_arguments(model: str) -> tuple[str, ...]:
    prompts = str(ROOT / "experiments" / "story_openings.jsonl")
    return ("grpo.py", "--model", model, "--prompts", prompts, "--rewards", "animals", "--sampling.max_tokens", "128")


def start(recipe: Recipe, cache: str, statistics_file: str = "") -> float:
    """Seconds until the recipe has made its first step in a new directory."""
    script, *arguments = recipe.arguments
    profiler = ["-m", "cProfile", "-o", statistics_file] if statistics_file else []
    if statistics_file:
        Path(statistics_file).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, *profiler, str(ROOT / "experiments" / script), *arguments, "--directory", directory]
        environment = {**os.environ, "RLJAX_CACHE": cache}
        began = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
            watched = None if recipe.first_line is None else Path(directory) / recipe.first_line
            seconds = wait_for(process, watched, began)
            process.terminate()
    return seconds


def wait_for(process: subprocess.Popen, file: Path | None, began: float) -> float:
    """Seconds since `began` when the file has a line, or where there is none, when the process has ended well."""
    while process.poll() is None:
        if file is not None and file.exists() and b"\n" in file.read_bytes():
            return time.perf_counter() - began
        time.sleep(0.01)
    if process.returncode or file is not None:
        raise RuntimeError(f"{' '.join(process.args)} ended with exit code {process.returncode} before its first step")
    return time.perf_counter() - began


if __name__ == "__main__":
    run(Config, main)
