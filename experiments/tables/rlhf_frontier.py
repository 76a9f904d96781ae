r"""How much reward for how much KL: PPO, RLOO, GRPO and DPO from one fine-tuned model, under one reward model.

    python experiments/tables/rlhf_frontier.py --model DIR        # runs that are finished are read back: docs/rlhf.md

For each seed rlhf.py walks the road once to a fine-tuned model and a reward model, then each method goes on from there:
PPO, RLOO and GRPO against the reward model, DPO on the comparisons that it was trained on. Reward and KL to the
fine-tuned model are means over 256 stories that begin with openings held out from every stage; the lines of the picture
are the training steps on the way, means over a step's stories. Nothing is tuned to make methods equal: each has the
coefficient of the KL that rlhf.py gives it.

Reached: docs/rlhf.md.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from experiments import rlhf
from experiments.common import command_line
from experiments.common.pictures import COLORS, GRID, grid, svg, text, title_text
from experiments.common.records import read_or_make
from rljax.train.log import log_info, write_atomically
from rljax.train.provenance import git_revision

METHODS = ("ppo", "rloo", "grpo", "dpo")
EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])  # the page begins with it
Point = tuple[float, float]  # KL, reward


@dataclasses.dataclass(frozen=True)
class Config:
    """Methods x seeds."""

    model: str  # directory of a pretrained model that tells stories
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = METHODS
    directory: str = "runs/rlhf_frontier"  # of the runs
    out: str = "docs/rlhf.md"  # the page; the picture is beside it


def main(cfg: Config) -> list[dict]:
    """Run what is not done yet, write the page after each run, and return a record for each run."""
    results = []
    for seed in cfg.seeds:
        for method in cfg.methods:
            results.append(measure(cfg, method, seed))
            page = Path(cfg.out)
            write_atomically(page.with_suffix(".svg"), picture(results))
            write_atomically(page, results_page(results, page.with_suffix(".svg").name))
    log_info(f"written: {cfg.out}")
    return results


def measure(cfg: Config, method: str, seed: int) -> dict:
    """Reward and KL before and after, and at every step; read back where the run is finished."""
    root = Path(cfg.directory, f"seed{seed}")

    def make() -> dict:
        log_info(f"== {method}, seed {seed}")
        reached = rlhf.main(rlhf.Config(cfg.model, algorithm=method, seed=seed, directory=str(root)))
        return {"method": method, "seed": seed, "git": git_revision(), **reached, "path": path_of(root / method)}

    return read_or_make(root / f"{method}.json", make)


def path_of(run: Path) -> list[Point]:
    """KL and reward of each training step; none of DPO, which samples nothing."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(step["kl_sequence"], step["reward"]) for step in steps if "kl_sequence" in step]


def results_page(results: Sequence[dict], image: str) -> str:
    """Markdown: a table of all runs, and the picture."""
    lines = ["# Reward against KL", "", "Written by `python experiments/tables/rlhf_frontier.py`; do not edit.", ""]
    lines += [EXPLANATION, "", f"![reward against KL]({image})", ""]
    lines += [
        "| method | seed | reward before | reward after | standard errors gained | KL, nats a story |",
        "|---" * 6 + "|",
    ]
    for result in sorted(results, key=lambda found: (METHODS.index(found["method"]), found["seed"])):
        before, after = result["before"], result["after"]
        error = (before["error"] ** 2 + after["error"] ** 2) ** 0.5
        rewards = " | ".join(f"{found['reward']:.2f} ± {found['error']:.2f}" for found in (before, after))
        gain = (after["reward"] - before["reward"]) / error
        lines.append(f"| {result['method']} | {result['seed']} | {rewards} | {gain:.1f} | {max(after['kl'], 0):.1f} |")
    commits = ", ".join(dict.fromkeys(str(result["git"]) for result in results))
    return "\n".join([*lines, "", f"Commits of the runs: {commits}.", ""])


def picture(results: Sequence[dict]) -> str:
    """Reward against KL: a line for the steps of each run, and a dot for what it reached."""
    left, top, width, height = 60, 30, 520, 300
    ends = [(found["kl"], found["reward"]) for result in results for found in (result["before"], result["after"])]
    points = [point for result in results for point in result["path"]] + ends
    most_kl = max(kl for kl, _ in points) * 1.05 or 1.0
    lowest = min(reward for _, reward in points)
    highest = max(reward for _, reward in points)
    reward_range = max(highest - lowest, 1e-9)

    def place(kl: float, reward: float) -> tuple[float, float]:
        return left + width * max(kl, 0.0) / most_kl, top + height * (1 - (reward - lowest) / reward_range)

    parts = [title_text("reward against KL to the fine-tuned model", left)]
    x_numbers = [f"{share * most_kl:.1f}" for share in GRID]
    y_numbers = [f"{lowest + share * reward_range:.2f}" for share in GRID]
    parts += grid((left, top, width, height), x_numbers, y_numbers, "KL, nats a story")
    for n, method in enumerate(METHODS):
        for result in results:
            if result["method"] == method:
                line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in result["path"])
                parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[n]}" opacity="0.4"/>')
                x, y = place(result["after"]["kl"], result["after"]["reward"])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLORS[n]}"/>')
        parts.append(text(left + width + 8, top + 14 + 18 * n, method, "start", fill=COLORS[n]))
    return svg(left + width + 80, top + height + 44, parts)


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
