"""What does each estimator estimate? By enumeration, not by sampling: writes docs/estimators.md.

    python experiments/tables/estimators.py     # two to five minutes on two CPU cores; the same file each time

A language model small enough to list every group of 2 and of 3 completions gives the exact mean and variance of each
algorithm's gradient, through the library's own code: `exact/` does the sums. A new algorithm is a line in
`exact/algorithms.py`.

Reached: docs/estimators.md.
"""

import dataclasses
from pathlib import Path

import jax
from experiments.common.command_line import run

from experiments.tables.exact import credit, divergences, gradient_tables, problems
from experiments.tables.exact.algorithms import ALGORITHMS, MAX_LENGTH, WEIGHTINGS
from experiments.tables.exact.gradients import BETA, ENTROPY_COEFFICIENT, measure_gradients
from experiments.tables.exact.language import make_tree
from experiments.tables.exact.markdown import fill_page, format_number
from rljax.train.log import write_atomically

TEMPLATE = Path(__file__).parent / "exact" / "page.md"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "estimators.md"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is enumerated, and where the tables go."""

    vocab_size: int = 3  # tokens; one of them ends a completion
    kls: tuple[float, ...] = (0.01, 0.1, 0.5)  # KL(behavior ‖ policy) of completions, nats
    probs: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)  # of a right completion, in the table of prompts
    num_generations: int = 8  # completions of a group, in that table
    seed: int = 0  # of policies and rewards
    only: str = ""  # algorithms whose name contains this; the file then leaves out the others
    file: str = str(PAGE)  # what is written


def main(cfg: Config) -> str:
    """Measure, write the page, and return its text."""
    algorithms = {name: algorithm for name, algorithm in ALGORITHMS.items() if cfg.only in name}
    with jax.enable_x64(True):
        measurements = measure(cfg, algorithms)
        parts = {
            **{"β": BETA, "c": ENTROPY_COEFFICIENT, "T": MAX_LENGTH},
            "num_generations": cfg.num_generations,
            "kl": cfg.kls[1],
            "norm": format_number(float(jax.numpy.linalg.norm(measurements.truth[3]["J"]))),
            **gradient_parts(measurements),
            "prompts": prompts_part(cfg, algorithms),
            **kl_parts(cfg, measurements),
            "credit": credit.outcome_table(measurements.tree, measurements.problem, measurements.binary),
            "critic": credit.critic_table(measurements.tree, measurements.problem),
        }
    text = fill_page(TEMPLATE, parts)
    write_atomically(Path(cfg.file), text)
    return text


def measure(cfg: Config, algorithms: dict) -> gradient_tables.Measurements:
    """The gradients of all algorithms, on-policy and off-policy, in groups of 2 and of 3."""
    tree = make_tree(cfg.vocab_size, MAX_LENGTH)
    on_policy, *off_policy = problems.random_problems(tree, cfg.seed, cfg.kls)
    binary, _ = problems.random_problem(tree, cfg.seed, binary=True)
    stack = [on_policy, binary, *off_policy]
    moments = {G: measure_gradients(algorithms, WEIGHTINGS.values(), tree, stack, G) for G in (2, 3)}
    return gradient_tables.Measurements(algorithms, tuple(WEIGHTINGS), tree, on_policy, binary, cfg.kls, moments)


def gradient_parts(measurements: gradient_tables.Measurements) -> dict[str, str]:
    return {
        "own_objective": gradient_tables.own_objective_table(measurements),
        "objective_by_weighting": gradient_tables.objective_by_weighting_table(measurements),
        "on_policy": gradient_tables.on_policy_table(measurements),
        "by_weighting": gradient_tables.by_weighting_table(measurements),
        "off_policy": gradient_tables.off_policy_table(measurements),
        "kl_regularized": gradient_tables.kl_regularized_table(measurements),
        "all_numbers": gradient_tables.all_numbers(measurements),
    }


def prompts_part(cfg: Config, algorithms: dict) -> str:
    """Of algorithms without a further term in the loss or the reward."""
    tree = make_tree(2, 1)._replace(ended=True)
    plain = {name: x for name, x in algorithms.items() if "+ " not in name and "ref_logp" not in x.needs}
    coins = [problems.coin_flip(p) for p in cfg.probs]
    moments = measure_gradients(plain, (), tree, coins, cfg.num_generations)
    return gradient_tables.prompts_table(tree, moments, cfg.probs)


def kl_parts(cfg: Config, measurements: gradient_tables.Measurements) -> dict[str, str]:
    """Of completions of one token, and of the completions whose gradients were measured."""
    token_tree = make_tree(cfg.vocab_size + 1, 1)
    token_problems = problems.random_problems(token_tree, cfg.seed, cfg.kls)
    tree = measurements.tree
    on_policy, *off_policy = problems.random_problems(tree, cfg.seed, cfg.kls)
    return {
        "kl_of_a_token": divergences.kl_table(token_tree, token_problems[0], token_problems[2]),
        "kl_of_completions": divergences.kl_table(tree, on_policy, off_policy[1]),
    }


if __name__ == "__main__":
    run(Config, main)
