r"""Is it the reward? arithmetic_grpo.py with right, random and shuffled rewards, from the same warm-up.

    python experiments/arithmetic_controls.py                    # resumes; arms that are done are read back
    python experiments/arithmetic_controls.py --seeds 0 1 2

Random rewards are coins; shuffled ones are the right rewards given to other rows of the batch. A gain in those arms
beyond its 95 % interval would mean that something other than the answers' correctness raises accuracy.

Reached: seed 0, 240 steps: random 0.380 -> 0.000, shuffled 0.380 -> 0.000 (interval ± 0.030): no gain; noise at this
learning rate destroys what the warm-up taught. With the right rewards: 0.380 -> 0.918.
"""

import dataclasses
from typing import Literal

import arithmetic_grpo
import options
from rljax.train.log import log_info, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Three arms over seeds."""

    seeds: tuple[int, ...] = (0,)  # of the runs
    arms: tuple[Literal["exact", "random", "shuffled"], ...] = ("exact", "random", "shuffled")  # rewards
    run: arithmetic_grpo.Config = arithmetic_grpo.Config()  # what all of them share


def gain(before: float, after: float, count: int) -> tuple[float, float]:
    """after - before, and the half-width of its 95 % interval: two binomial shares of `count` draws each."""
    variance = (before * (1 - before) + after * (1 - after)) / count
    return after - before, 1.96 * variance**0.5


def main(cfg: Config) -> list[dict]:
    rows = []
    for arm in cfg.arms:
        for seed in cfg.seeds:
            log_info(f"== reward {arm}, seed {seed}")
            place = cfg.run.directory and f"{cfg.run.directory}/{arm}-seed{seed}"
            run = dataclasses.replace(cfg.run, seed=seed, reward=arm, directory=place)
            reached = arithmetic_grpo.main(run)
            change, half = gain(reached["before"], reached["after"], run.held_out)
            verdict = "gain" if change > half else "loss" if change < -half else "no change"
            rows.append({"reward": arm, "seed": seed, **reached, "change": change, "95 %": half, "": verdict})
    table("held-out accuracy by arm", rows)
    return rows


if __name__ == "__main__":
    options.run(Config, main)
