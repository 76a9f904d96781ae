r"""Every algorithm on the same task from the same warm-up: docs/results.md.

    python experiments/tables/compare.py                        # resumes: what is done is read back, what was cut off goes on
    python experiments/tables/compare.py --algorithms gspo remax --seeds 0 --out runs/results.md

Per seed one supervised checkpoint, then each algorithm of arithmetic_grpo.py from there with the same prompts,
optimizer and number of steps. Nothing is tuned for any of them. All learn from the answers that DAPO's filter keeps,
in two updates per rollout: in the first ratios are 1, in the second they are not, so that methods which differ only in
what they do with ratios (grpo, gspo, sapo; dapo, cispo; reinforce, rloo) part there. Accuracy is measured on 1,024
held-out problems.

Reached: docs/results.md.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import arithmetic_grpo
import options
from arithmetic_grpo import ALGORITHMS, AlgorithmName
from rljax.train.log import log_info, table

BATCHES = options.Batches(prompts=32, num_generations=8, oversample=2, minibatches=2)
RATE = options.Optimizer(learning_rate=4e-4, schedule="cosine")  # half the demo's: two updates per rollout
SORTING = arithmetic_grpo.Config(
    task="sortings", steps=40, batches=BATCHES, optimizer=RATE, sft_target=0.25, sft_check_every=1
)
ADDITION = arithmetic_grpo.Config(steps=100, batches=BATCHES, optimizer=RATE)


@dataclasses.dataclass(frozen=True)
class Config:
    """Algorithms x seeds on sorting; a few on addition."""

    algorithms: tuple[AlgorithmName, ...] = tuple(ALGORITHMS)  # on sorting
    additions: tuple[AlgorithmName, ...] = ("dapo", "gspo", "rloo")  # on addition
    seeds: tuple[int, ...] = (0, 1, 2)  # of the runs
    sorting: arithmetic_grpo.Config = SORTING  # what its runs share
    addition: arithmetic_grpo.Config = ADDITION  # what its runs share
    directory: str = "runs/compare"  # of the runs and of results.jsonl
    out: str = "docs/results.md"  # the page


def runs(cfg: Config) -> list[arithmetic_grpo.Config]:
    """One a line of results: seed by seed, so that an early page compares all algorithms."""
    plan = []
    for seed in cfg.seeds:
        for shared, names in ((cfg.sorting, cfg.algorithms), (cfg.addition, cfg.additions)):
            plan += [dataclasses.replace(shared, seed=seed, algorithm=name) for name in names]
    return plan


def settings(run: arithmetic_grpo.Config) -> str:
    """What a result is a result of: the settings of the run and the code of its algorithm."""
    return options.fingerprint(dataclasses.asdict(run), ALGORITHMS[run.algorithm]())


def measure(run: arithmetic_grpo.Config, directory: str) -> dict:
    """Runs it, or what is left of it. `seconds` are those of the algorithm alone, compilation included."""
    log_info(f"== {run.task}, {run.algorithm}, seed {run.seed}")
    code = settings(run)
    place, taught = (f"{directory}/{run.task}-{name}-seed{run.seed}" for name in (run.algorithm, "warm_up"))
    run = dataclasses.replace(run, directory=place, sft_directory=taught)
    arithmetic_grpo.warmed_up(run)
    began = time.monotonic()
    reached = arithmetic_grpo.main(run)
    about = json.loads(Path(place, "config.json").read_text())
    facts = {"git": about["git"], "jax": about["jax"], "seconds": time.monotonic() - began, "settings": code}
    return {"task": run.task, "algorithm": run.algorithm, "seed": run.seed, "steps": run.steps, **reached, **facts}


def page(results: list[dict]) -> str:
    """Markdown: a table a task, algorithms by the median of what they reached."""
    lines = ["# Results", "", "Written by `python experiments/tables/compare.py`; do not edit.", ""]
    lines += ["\n\n".join(__doc__.split("\n\n")[2:-1]), ""]
    for task in dict.fromkeys(result["task"] for result in results):
        rows = [result for result in results if result["task"] == task]
        steps, seeds = rows[0]["steps"], sorted({row["seed"] for row in rows})
        before = ", ".join(f"{row['before']:.3f}" for row in {row["seed"]: row for row in rows}.values())
        lines += [f"## {task}", "", f"{steps} steps; held-out accuracy after the warm-up, by seed: {before}.", ""]
        lines += ["| algorithm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | median | longest run, s |"]
        lines += ["|---" * (len(seeds) + 3) + "|"]
        of = {name: {r["seed"]: r for r in rows if r["algorithm"] == name} for name in {r["algorithm"] for r in rows}}
        median = {name: statistics.median(r["after"] for r in found.values()) for name, found in of.items()}
        for name in sorted(of, key=lambda name: (-median[name], name)):
            cells = [f"{of[name][seed]['after']:.3f}" if seed in of[name] else "" for seed in seeds]
            longest = max(row["seconds"] for row in of[name].values())
            lines += [f"| {name} | " + " | ".join(cells) + f" | {median[name]:.3f} | {longest:.0f} |"]
        lines += [""]
    at = {row["git"].rstrip("+"): row["jax"] for row in results if row["git"]}
    lines += ["Commits and jax of the runs: " + ", ".join(at) + "; " + ", ".join(dict.fromkeys(at.values())) + "."]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> list[dict]:
    kept = Path(cfg.directory, "results.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results = []
    for run in runs(cfg):
        result = next((old for old in done if old["settings"] == settings(run)), None)
        if result is None:
            result = measure(run, cfg.directory)
            with kept.open("a") as file:
                file.write(json.dumps(result) + "\n")
        results.append(result)
        Path(cfg.out).write_text(page(results))
    for task in dict.fromkeys(result["task"] for result in results):
        shown = ("algorithm", "seed", "steps", "before", "after", "seconds", "git")
        table(f"held-out accuracy, {task}", [{k: r[k] for k in shown} for r in results if r["task"] == task])
    log_info(f"written: {cfg.out}")
    return results


if __name__ == "__main__":
    options.run(Config, main)
