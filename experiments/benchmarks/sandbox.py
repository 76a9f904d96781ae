r"""Programs that the sandbox runs in a second, beside a bare interpreter that does nothing.

    python experiments/benchmarks/sandbox.py
    python experiments/benchmarks/sandbox.py --humaneval humaneval.jsonl.gz     # and solutions with their tests

`pass` is run by `python -I -S -c pass` and by `run_code` at each level that this machine has, so many at a time as
there are threads. With --humaneval the canonical solutions are judged as `--rewards code` does it; the last line
counts those that pass.
"""

import dataclasses
import gzip
import json
import statistics
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import get_args

from experiments.benchmarks.common import alternately, named, run, write_figures
from rljax.rewards import sandbox
from rljax.rewards.code import function_tests
from rljax.train.log import log_info, table

EMPTY = [sandbox.INTERPRETER, "-I", "-S", "-c", "pass"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    threads: int = 2  # programs at a time
    programs: int = 40  # in a round
    repeats: int = 5  # timed rounds of each
    humaneval: str = ""  # jsonl.gz file of HumanEval
    json: str = ""  # where to write the figures


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    with ThreadPoolExecutor(cfg.threads) as threads:
        works = {"python -I -S -c pass": in_threads(threads, cfg.programs, bare)}
        for level in get_args(sandbox.Level):
            try:
                sandbox.probe_isolation(level)
            except sandbox.SandboxError as error:
                log_info(str(error))
                continue
            works[f"run_code, {level}"] = in_threads(threads, cfg.programs, partial(in_sandbox, level))
        rounds = alternately(works, cfg.repeats)
        rates = {name: cfg.programs / statistics.median(seconds) for name, seconds in rounds.items()}
        first = rates["python -I -S -c pass"]
        lines = [{"": name, "a second": rate, "times as long": first / rate} for name, rate in rates.items()]
        if cfg.humaneval:
            lines.append(judge_humaneval(cfg, threads, first))
    table(f"{cfg.threads} at a time, medians of {cfg.repeats} rounds of {cfg.programs}", lines)
    figures = named(lines)
    write_figures(cfg.json, figures)
    return figures


def in_threads(threads: ThreadPoolExecutor, count: int, run: Callable[[int], None]) -> Callable[[int], list]:
    """work(i): so many runs, side by side."""
    return lambda _: list(threads.map(run, range(count)))


def bare(_: int) -> None:
    """A Python process that does nothing."""
    subprocess.run(EMPTY, env={}, check=True)


def in_sandbox(level: sandbox.Level, _: int) -> None:
    """The same in the sandbox."""
    found = sandbox.run_code("pass", isolation=level, limits=sandbox.ResourceLimits(seconds=60.0))
    if found.status != "ok":
        raise RuntimeError(f"an empty program ended with {found}")


def judge_humaneval(cfg: Config, threads: ThreadPoolExecutor, first: float) -> dict:
    """The line of HumanEval's canonical solutions."""
    with gzip.open(cfg.humaneval, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def judge(row: dict) -> float:
        columns = (row["prompt"], row["test"], row["entry_point"])
        return function_tests(row["canonical_solution"], *columns, seconds=60.0)

    passed = []
    seconds = alternately({"": lambda _: passed.append(sum(threads.map(judge, rows)))}, cfg.repeats)[""]
    log_info(f"{passed[-1]:g} of {len(rows)} canonical solutions pass")
    rate = len(rows) / statistics.median(seconds)
    return {"": "HumanEval, solutions", "a second": rate, "times as long": first / rate}


if __name__ == "__main__":
    run(Config, main)
