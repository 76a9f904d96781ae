r"""What share of the roofline of this machine a rollout and a GRPO update reach.

    python experiments/benchmarks/shares.py
    python experiments/benchmarks/shares.py --preset W2 --micro_batches 4
    python experiments/benchmarks/shares.py --rates True          # the rates that the roofline is made of, too

The roofline (roofline.py) is measured before and after, the best of both counts: what else runs only ever lowers it.
Both works run on one device, and so does the roofline.
"""

import dataclasses
import statistics
from typing import Literal

import jax

from experiments.benchmarks.common import WORKLOADS, Output, alternately, named, prompts, run, trace, write_figures
from experiments.benchmarks.roofline import Rates, least_seconds, measure, rollout_works, share, update_works
from experiments.benchmarks.train_step import cut_as_recipes, own_step
from rljax.models import decoder, policy
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table
from rljax.types import Sampling


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure, in float32."""

    preset: Literal["W1", "W2"] = "W1"  # the workload
    micro_batches: tuple[int, ...] = (0,)  # pieces of an update, each measured; 0: as recipes choose them from sizes
    repeats: int = 5  # timed runs of each
    rates: bool = False  # print the rates of all shapes and working sets


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    workload = WORKLOADS[cfg.preset]
    config = workload.config
    roofs = {"rollout": rollout_works(workload, config), "update": update_works(workload, config)}
    passes = roofs["rollout"] + roofs["update"]
    lm = decoder.language_model(config, devices=1)
    params = policy.init(config, jax.random.key(0))
    rows = prompts(config, workload.prompts, workload.prompt_tokens)
    sampling = Sampling(n=workload.n, max_tokens=workload.completion_tokens)
    works = {"rollout": lambda i: sample(lm, params, {}, rows, sampling, 0, i)}
    numbers = [cut_as_recipes("grpo", workload, m).micro_batches for m in cfg.micro_batches]
    works |= {f"update, {m} micro-batches": own_step("grpo", workload, m) for m in numbers}

    rates = measure(passes, config.dtype, cfg.repeats)
    times = alternately(works, cfg.repeats)
    rates = measure(passes, config.dtype, cfg.repeats, before=rates)
    trace(works, cfg.profile)
    lines = []
    for name, seconds in times.items():
        least = least_seconds(roofs[name.split(",")[0]], rates)
        median = statistics.median(seconds)
        best = min(seconds)
        shares = {"share": share(least, median), "share, best run": share(least, best)}
        lines.append({"": name, "roofline, s": least, "median, s": median, "best, s": best, **shares})
    if cfg.rates:
        print_rates(rates)
    log_info(f"float32 on {jax.devices()[0].device_kind}, medians of {cfg.repeats}, taking turns")
    table(cfg.preset, lines)
    figures = named(lines, f"{cfg.preset}, ")
    write_figures(cfg.json, figures)
    return figures


def print_rates(rates: Rates) -> None:
    products = [{"product": " x ".join(map(str, shape)), "GFLOP/s": rate / 1e9} for shape, rate in rates.flops.items()]
    table("rows x inner x columns", products)
    table("reading", [{"MB": size / 1e6, "GB/s": rate / 1e9} for size, rate in sorted(rates.reading.items())])


if __name__ == "__main__":
    run(Config, main)
