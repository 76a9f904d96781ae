r"""Every algorithm sorts digits, from the same warm-up: docs/results.md, and the curves in docs/results/.

    python experiments/tables/compare.py        # runs that are finished are read back, an interrupted one goes on
    python experiments/tables/compare.py --algorithms gspo remax --seeds 0 --out runs/results.md
    python experiments/tables/compare.py --finished_only        # runs nothing: the page of what is finished so far

Finished runs are recorded in docs/results/runs.jsonl, which goes with the repository: any machine goes on from there. A
run counts as finished where one with its settings is recorded, by whatever commit: the page names the commits. Whoever
changes what an algorithm computes deletes its lines.

For each seed one supervised checkpoint, then each algorithm of arithmetic_grpo.py from there with the same prompts,
optimizer and number of steps. Nothing is tuned for any of them. Methods that compare the completions of a prompt learn
from the groups that DAPO's dynamic sampling keeps, of twice as many; the others from all that are sampled. There are
two updates per rollout: in the first the ratios are 1, in the second they are not, so that methods which differ only in
what they do with ratios (grpo, gspo, sapo; dapo, cispo) part there. Methods without a ratio, and those that compare
completions in their loss, take one update on all rows. Accuracy is measured on 1,024 problems never trained on.

online_dpo (arithmetic_online_dpo.py) samples as many completions as methods that select do, and makes a pair of the
best and the worst completion of each prompt, in two updates. raft is supervised fine-tuning on the best completion of
each prompt, rft on all right ones: rejection sampling, whose completions are the policy's of that step.

Methods stand in the order of their medians over the seeds that all of them have run. Seeds differ more than methods do,
for each has a warm-up of its own; so each method is also compared with GRPO seed by seed: the mean of the differences,
and its 95 % confidence interval (Student's t). Of forty such intervals two leave out 0 by chance. The seconds are those
of a run on whatever else the machine was doing, compilation included.

Reached: docs/results.md.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

from experiments import arithmetic_grpo, arithmetic_online_dpo
from experiments.arithmetic_grpo import ALGORITHMS
from experiments.common.command_line import run as run_command
from experiments.common.records import append_lines, read_lines
from experiments.common.settings import Batches, Optimizer
from experiments.tables.results_page import write_page
from rljax.train.log import log_info, table
from rljax.train.report import flatten_settings

BATCHES = Batches(prompts=32, num_generations=8, oversample=2, minibatches=2)
OPTIMIZER = Optimizer(learning_rate=4e-4, schedule="cosine")  # half the demo's rate: two updates per rollout
SORTING = arithmetic_grpo.Config(
    task="sortings", steps=40, batches=BATCHES, optimizer=OPTIMIZER, sft_target=0.25, sft_check_every=1, eval_every=8
)
ONLINE_DPO = "online_dpo"
# trpo takes one step on all rows
METHODS = (*(name for name in ALGORITHMS if name != "trpo"), ONLINE_DPO)
AnyRun = arithmetic_grpo.Config | arithmetic_online_dpo.Config
EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])  # what is compared: the page begins with it


@dataclasses.dataclass(frozen=True)
class Config:
    """Algorithms x seeds."""

    algorithms: tuple[Literal[METHODS], ...] = METHODS  # to compare
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the runs
    sorting: arithmetic_grpo.Config = SORTING  # what the runs share
    directory: str = "runs/compare"  # of the runs
    records: str = "docs/results/runs.jsonl"  # what each finished run reached
    out: str = "docs/results.md"  # the page
    finished_only: bool = False  # run nothing, write the page of the runs that are finished


def main(cfg: Config) -> list[dict]:
    """Run what is not done yet, write the page after each run, and return a record for each run."""
    log = Path(cfg.records)
    log.parent.mkdir(parents=True, exist_ok=True)
    finished = read_lines(log)
    results = []
    for run in planned_runs(cfg):
        result = next((record for record in finished if is_of(record, run)), None)
        if result is None and cfg.finished_only:
            continue
        if result is None:
            result = measure(run, cfg.directory) | {"settings": settings_of(run)}
            append_lines(log, [result])
        results.append(result)
        if not cfg.finished_only:
            write_page(Path(cfg.out), results, EXPLANATION)
    if not results:
        raise ValueError(f"no run is recorded in {cfg.records}; legal: without --finished_only")
    write_page(Path(cfg.out), results, EXPLANATION)
    columns = ("algorithm", "seed", "steps", "before", "after", "seconds", "git")
    table("eval accuracy", [{name: result[name] for name in columns} for result in results])
    log_info(f"written: {cfg.out}")
    return results


def planned_runs(cfg: Config) -> list[AnyRun]:
    """Seed by seed, so that an early page compares all algorithms."""
    return [run_of(cfg.sorting, name, seed) for seed in cfg.seeds for name in cfg.algorithms]


def run_of(shared: arithmetic_grpo.Config, name: str, seed: int) -> AnyRun:
    """The shared settings; one update of methods that want all rows in it, no selection for those without groups."""
    if name == ONLINE_DPO:
        return online_dpo_run(shared, seed)
    algorithm = ALGORITHMS[name]()
    minibatches = 1 if algorithm.one_update or algorithm.whole_groups else shared.batches.minibatches
    oversample = 1 if algorithm.group_signal is None else shared.batches.oversample
    batches = dataclasses.replace(shared.batches, minibatches=minibatches, oversample=oversample)
    return dataclasses.replace(shared, seed=seed, algorithm=name, batches=batches)


def online_dpo_run(shared: arithmetic_grpo.Config, seed: int) -> arithmetic_online_dpo.Config:
    """The shared settings, with a pair of each prompt that is sampled."""
    both = {field.name for field in dataclasses.fields(arithmetic_online_dpo.Config)} & vars(shared).keys()
    prompts = shared.batches.prompts * shared.batches.oversample
    batches = dataclasses.replace(shared.batches, prompts=prompts, oversample=1)
    settings = {name: getattr(shared, name) for name in both} | {"seed": seed, "batches": batches}
    return arithmetic_online_dpo.Config(**settings)


def method_of(run: AnyRun) -> str:
    """The name of what a run learns by."""
    return ONLINE_DPO if isinstance(run, arithmetic_online_dpo.Config) else run.algorithm


def settings_of(run: AnyRun) -> dict[str, Any]:
    """Name, with dots -> value of what a result depends on: all settings but the mesh."""
    settings = json.loads(json.dumps(dataclasses.asdict(run)))
    del settings["mesh"]
    return flatten_settings(settings)


def is_of(record: dict, run: AnyRun) -> bool:
    """Whether a recorded result is that of this run. A setting that the record does not have is newer than it."""
    kept = record["settings"]
    equal = all(kept.get(name, value) == value for name, value in settings_of(run).items())
    return equal and record["algorithm"] == method_of(run)


def measure(run: AnyRun, directory: str) -> dict:
    """Run it, or what is left of it. `seconds` are those of the algorithm alone, compilation included."""
    method = method_of(run)
    log_info(f"== {run.task}, {method}, seed {run.seed}")
    run_directory = f"{directory}/{run.task}-{method}-seed{run.seed}"
    sft_directory = f"{directory}/{run.task}-sft-seed{run.seed}"
    run = dataclasses.replace(run, directory=run_directory, sft_directory=sft_directory)
    arithmetic_grpo.warmed_up(run)
    script = arithmetic_online_dpo if method == ONLINE_DPO else arithmetic_grpo
    start = time.monotonic()
    reached = script.main(run)
    seconds = time.monotonic() - start
    recorded = json.loads(Path(run_directory, "config.json").read_text())
    logged = map(json.loads, Path(run_directory, "metrics.jsonl").read_text().splitlines())
    curve = [[0, reached["before"]]] + [[m["step"] + 1, m["eval_reward"]] for m in logged if "eval_reward" in m]
    return {
        "task": run.task,
        "algorithm": method,
        "seed": run.seed,
        "steps": run.steps,
        **reached,
        "curve": curve,  # [steps, eval accuracy]
        "git": recorded["git"],
        "jax": recorded["jax"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    run_command(Config, main)
