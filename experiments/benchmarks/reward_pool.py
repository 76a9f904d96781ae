r"""Completions that `rljax.rewards.pool` judges in a second, and how long one batch takes.

    python experiments/benchmarks/reward_pool.py
    python experiments/benchmarks/reward_pool.py --workers 4 --completions 1000

The same verifiers are called in this process, by multiprocessing.Pool.map, and by the pool, which kills what takes
too long and so hands over one call at a time. `number` is `rewards.number.exact_number` on a short solution; `slow`
computes for about a millisecond, as verifiers that parse or run something do.
"""

import dataclasses
import multiprocessing
import statistics
from functools import partial

import tyro

from experiments.benchmarks.common import Output, alternately, named, trace, write_figures
from rljax.rewards.number import exact_number
from rljax.rewards.pool import Pool
from rljax.train.log import table


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    workers: int = 2  # processes
    completions: int = 512  # judged in a row, for the throughput
    batch: int = 8  # completions of a small batch, for the latency
    repeats: int = 5  # timed runs of each


def slow(completion: str, answer: str) -> float:
    """A millisecond of work."""
    return float(sum(range(50_000)) > 0 and answer in completion)


VERIFIERS = {"number": exact_number, "slow": slow}


def judge(verifier, completion: str, columns: dict[str, str]) -> float:
    return verifier(completion, **columns)


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    lines = []
    with Pool(workers=cfg.workers) as pool, multiprocessing.get_context("spawn").Pool(cfg.workers) as plain:
        for name, verifier in VERIFIERS.items():
            works = {}
            for count in (cfg.completions, cfg.batch):
                works |= works_of(verifier, count, pool, plain)
            times = alternately(works, cfg.repeats)
            trace({f"{name}, {how}": work for how, work in works.items()}, cfg.profile)
            for how in ("in this process", "multiprocessing.Pool.map", "rewards.pool"):
                throughput = cfg.completions / statistics.median(times[f"{how}, {cfg.completions}"])
                latency = statistics.median(times[f"{how}, {cfg.batch}"])
                lines.append(
                    {
                        "": f"{name}, {how}",
                        "completions/s": throughput,
                        f"{cfg.batch} completions, ms": 1e3 * latency,
                    }
                )
    table(f"{cfg.workers} workers, medians of {cfg.repeats}", lines)
    figures = named(lines)
    write_figures(cfg.json, figures)
    return figures


def works_of(verifier, count: int, pool: Pool, plain) -> dict:
    """work(i) of each way to judge so many completions."""
    texts = [f"First we add {i} and {i + 1}. The answer is {2 * i + 1}." for i in range(count)]
    answers = [str(2 * i + 1) for i in range(count)]
    calls = [((text,), {"answer": answer}) for text, answer in zip(texts, answers, strict=True)]
    columns = [{"answer": answer} for answer in answers]

    def in_this_process(_):
        return [verifier(text, answer=answer) for text, answer in zip(texts, answers, strict=True)]

    return {
        f"in this process, {count}": in_this_process,
        f"multiprocessing.Pool.map, {count}": lambda _: plain.starmap(
            partial(judge, verifier), zip(texts, columns, strict=True)
        ),
        f"rewards.pool, {count}": lambda _: len(pool.map(verifier, calls)),
    }


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
