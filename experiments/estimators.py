"""What does each estimator estimate? By enumeration, not by sampling: writes docs/estimators.md.

    python experiments/tables/estimators.py            # two to five minutes on two CPU cores; the same file each time

A language model small enough to list every group of 2 and of 3 answers gives the exact mean and variance of each
algorithm's gradient, through the library's own code: `exact/` does the sums. A new algorithm is a line in
`exact/named.py`.

Reached: docs/estimators.md.
"""

import dataclasses
from pathlib import Path

import jax

import options
from exact import tables, worlds
from exact.gradients import BETA, ENTROPY, measure
from exact.language import tree
from exact.measured import Measured
from exact.named import ALGORITHMS, LENGTH, WEIGHTINGS
from rljax.train.log import write_atomically


@dataclasses.dataclass(frozen=True)
class Config:
    """What is enumerated, and where the tables go."""

    vocabulary: int = 3  # tokens; one of them ends an answer
    distances: tuple[float, ...] = (0.01, 0.1, 0.5)  # KL(behaviour ‖ policy) of whole answers, nats
    odds: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)  # of an answer being right, in the table of prompts
    answers: int = 8  # of a group, in that table
    seed: int = 0  # of policies and rewards
    only: str = ""  # algorithms whose name contains this; the file then leaves out the others
    file: str = str(Path(__file__).resolve().parents[1] / "docs" / "estimators.md")  # what is written


def main(cfg: Config) -> str:
    algorithms = {name: x for name, x in ALGORITHMS.items() if cfg.only in name}
    with jax.enable_x64(True):
        lm, token, flip = tree(cfg.vocabulary, LENGTH), tree(cfg.vocabulary + 1, 1), tree(2, 1)._replace(ended=True)
        world, *off = worlds.moved(lm, cfg.seed, cfg.distances)
        token_world, *token_off = worlds.moved(token, cfg.seed, cfg.distances)
        binary, _ = worlds.random_world(lm, cfg.seed, binary=True)
        places, ways = [world, binary, *off], WEIGHTINGS.values()
        found = {G: measure(algorithms, ways, lm, places, G) for G in (2, 3)}
        plain = {name: x for name, x in algorithms.items() if "+ " not in name and "ref_logp" not in x.needs}
        odds = measure(plain, (), flip, [worlds.coin(p) for p in cfg.odds], cfg.answers)
        seen = Measured(algorithms, tuple(WEIGHTINGS), lm, world, binary, cfg.distances, found)
        parts = {
            **{"β": BETA, "c": ENTROPY, "G": cfg.answers, "distance": cfg.distances[1], "T": LENGTH},
            "own_objective": seen.own_objective(),
            "objective_by_weighting": seen.objective_by_weighting(),
            "on_policy": seen.on_policy(),
            "by_weighting": seen.by_weighting(),
            "off_policy": seen.off_policy(),
            "regularised": seen.regularised(),
            "prompts": tables.prompts(flip, odds, cfg.odds),
            "kl_of_a_token": tables.divergence(token, token_world, token_off[1]),
            "kl_of_answers": tables.divergence(lm, world, off[1]),
            "credit": tables.outcome(lm, world, binary),
            "critic": tables.critic(lm, world),
            "everything": seen.everything(),
            "norm": tables.digits(float(jax.numpy.linalg.norm(seen.truth[3]["J"]))),
        }
    write_atomically(Path(cfg.file), text := tables.fill(parts))
    return text


if __name__ == "__main__":
    options.run(Config, main)
