r"""Completions that `rljax.rewards.pool` judges in a second, and how long one batch takes.

    python experiments/benchmarks/reward_pool.py
    python experiments/benchmarks/reward_pool.py --workers 4 --completions 1000

`rewards.number.exact_number` judges short and long completions (of a few words, and of a thousand steps) in this
process, by multiprocessing.Pool.map, and by the pool, which kills what takes too long and so hands over one call at a
time. Its throughput is that of all rounds together: a worker is replaced after 500 calls.
"""

import dataclasses
import multiprocessing
import statistics

from experiments.benchmarks.common import Output, alternately, named, run, trace, write_figures
from rljax.rewards.number import exact_number
from rljax.rewards.pool import Pool
from rljax.train.log import table


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    workers: int = 2  # processes
    completions: int = 512  # judged in a round, for the throughput
    batch: int = 8  # completions of a small batch, for the latency
    repeats: int = 5  # timed runs of each


STEPS = {"short": 1, "long": 1000}  # of a solution: the first takes microseconds to judge, the second milliseconds


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    lines = []
    with Pool(workers=cfg.workers) as pool, multiprocessing.get_context("spawn").Pool(cfg.workers) as plain:
        for name, steps in STEPS.items():
            works = {}
            for count in (cfg.completions, cfg.batch):
                works |= works_of(steps, count, pool, plain)
            times = alternately(works, cfg.repeats)
            trace({f"{name}, {how}": work for how, work in works.items()}, cfg.profile)
            for how in ("in this process", "multiprocessing.Pool.map", "rewards.pool"):
                throughput = cfg.completions / statistics.mean(times[f"{how}, {cfg.completions}"])
                latency = f"{cfg.batch} completions, ms"
                milliseconds = 1e3 * statistics.median(times[f"{how}, {cfg.batch}"])
                lines.append({"": f"{name}, {how}", "completions/s": throughput, latency: milliseconds})
    table(f"{cfg.workers} workers, medians of {cfg.repeats}", lines)
    figures = named(lines)
    write_figures(cfg.json, figures)
    return figures


def works_of(steps: int, count: int, pool: Pool, plain) -> dict:
    """work(i) of each way to judge so many completions of so many steps."""
    texts = [f"Then we add {i} and {i + 1}. " * steps + f"The answer is {2 * i + 1}." for i in range(count)]
    answers = [str(2 * i + 1) for i in range(count)]
    arguments = list(zip(texts, answers, strict=True))
    calls = [(call, {}) for call in arguments]
    return {
        f"in this process, {count}": lambda _: [exact_number(*call) for call in arguments],
        f"multiprocessing.Pool.map, {count}": lambda _: plain.starmap(exact_number, arguments),
        f"rewards.pool, {count}": lambda _: len(pool.map(exact_number, calls)),
    }


if __name__ == "__main__":
    run(Config, main)
