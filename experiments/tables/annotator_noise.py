r"""How accurate does a reward model become when annotators err? Beside the exact limit: docs/annotator_noise.md.

    python experiments/tables/annotator_noise.py --model DIR     # runs that are finished are read back

The comparisons are those of rlhf.py, whose rule (which story names more animals) says which completion is better; each
is turned round with probability ε, in training and among those held out. No model can agree with such an annotator more
often than 1 - ε on comparisons that it has not seen: that is the limit, reached by who knows the rule. A model that
follows the rule in a share a of all comparisons agrees in a (1 - ε) + (1 - a) ε of them, so what it has learned of the
rule itself is

    a = (agreement - ε) / (1 - 2ε)

Reached: docs/annotator_noise.md.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments import rlhf
from experiments.common import command_line
from experiments.common.records import read_or_make
from rljax.data.files import read_table
from rljax.train.log import log_info, write_atomically
from rljax.train.provenance import git_revision

EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])  # the page begins with it


@dataclasses.dataclass(frozen=True)
class Config:
    """Shares of errors x seeds."""

    model: str  # directory of a pretrained model that tells stories
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)  # ε, below 1/2
    seeds: tuple[int, ...] = (0, 1, 2)  # of rlhf.py and of the errors
    directory: str = "runs/annotator_noise"  # of the runs
    out: str = "docs/annotator_noise.md"  # the page


def main(cfg: Config) -> list[dict]:
    """Run what is not done yet, write the page after each run, and return a record for each run."""
    if not all(0 <= noise < 0.5 for noise in cfg.noise):
        raise ValueError(f"noise = {cfg.noise}; legal: from 0 to less than 0.5, where a label says nothing")
    results = []
    for seed in cfg.seeds:
        for noise in cfg.noise:
            results.append(measure(cfg, noise, seed))
            write_atomically(Path(cfg.out), results_page(results, len(cfg.seeds) * len(cfg.noise)))
    log_info(f"written: {cfg.out}")
    return results


def measure(cfg: Config, noise: float, seed: int) -> dict:
    """Agreement of a reward model with held-out comparisons; read back where the run is finished."""
    root = Path(cfg.directory, f"seed{seed}")

    def make() -> dict:
        road = rlhf.Config(cfg.model, seed=seed, directory=str(root))
        tuned, preferences = rlhf.compare_completions(road, root)
        rows = with_errors(read_table(preferences).rows, noise, seed)
        file = rlhf.write_rows(root / f"preferences-noise{noise:g}.jsonl", rows)
        reached = rlhf.learn_rewards(road, tuned, file, root / f"reward_model-noise{noise:g}")["after"]
        return {"noise": noise, "seed": seed, "git": git_revision(), **reached}

    return read_or_make(root / f"noise{noise:g}.json", make)


def with_errors(rows: Sequence[dict], noise: float, seed: int) -> list[dict]:
    """The comparisons, each turned round with probability `noise`."""
    dice = random.Random(f"{seed} {noise}")
    turned = []
    for row in rows:
        is_error = dice.random() < noise
        better, worse = ("rejected", "chosen") if is_error else ("chosen", "rejected")
        ended = row["ended"][::-1] if is_error else row["ended"]
        turned.append({"prompt": row["prompt"], "chosen": row[better], "rejected": row[worse], "ended": ended})
    return turned


def learned(agreement: float, noise: float) -> float:
    """The share of comparisons in which a model follows the rule, of how often it agrees with the annotator."""
    return (agreement - noise) / (1 - 2 * noise)


def results_page(results: Sequence[dict], wanted: int) -> str:
    """Markdown: a row for each share of errors. wanted: number of runs that there are to be."""
    lines = ["# Annotators that err", "", "Written by `python experiments/tables/annotator_noise.py`; do not edit.", ""]
    lines += [EXPLANATION, "", "| ε | limit | agreement, by seed | mean | follows the rule, mean |", "|---" * 5 + "|"]
    for noise in sorted({result["noise"] for result in results}):
        found = [result["eval_accuracy"] for result in results if result["noise"] == noise]
        of_seeds = ", ".join(f"{agreement:.3f}" for agreement in found)
        rule = mean(learned(agreement, noise) for agreement in found)
        lines.append(f"| {noise:g} | {1 - noise:.3f} | {of_seeds} | {mean(found):.3f} | {rule:.3f} |")
    error = max(result["eval_accuracy_error"] for result in results)
    commits = ", ".join(dict.fromkeys(str(result["git"]) for result in results))
    lines += ["", f"{len(results)} of {wanted} runs are done."]
    lines += [f"The standard error of an agreement, that of independent openings, is at most {error:.3f}."]
    return "\n".join([*lines, f"Commits of the runs: {commits}.", ""])


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
