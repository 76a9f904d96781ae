"""Several runs on one page: `report.html`'s curves with a line for each group of runs.

Runs of one experiment whose settings differ in nothing but seed, directory and sft_directory are a group. Its line is
the mean over its runs; the band is Student's interval of that mean, point by point,

    mean ± t(0.975, n - 1) s/√n      n runs, s their standard deviation (ddof 1)

of the curves as they are drawn, smoothed where there are enough points. A line ends where the first of its runs ends.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from rljax.train.alarms import check_alarms
from rljax.train.log import write_atomically
from rljax.train.report import (
    first_and_last,
    group_by_theme,
    headline_names,
    peak_memory,
    read_metrics,
    read_run_config,
    render_page,
    round_digits,
    smooth,
    time_breakdown,
)

NOT_SETTINGS = ("seed", "directory", "sft_directory")  # in these alone the runs of a group may differ
MAX_LABEL = 90  # characters
NOTE = (
    "Means over the runs of a line; in parentheses, and as the band of a curve, Student's 95 % interval of the mean. "
    "Lines of 24 points or more are smoothed, run by run, before. A line ends where the first of its runs ends."
)


class LoggedRun(NamedTuple):
    """What a run directory says of a run."""

    name: str
    experiment: str
    facts: dict[str, str]
    settings: dict[str, str]
    columns: dict[str, tuple[list, list]]
    steps: list[int]


def write_comparison(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Write the page that compares these runs, and return its path. Raises ValueError for what is no run directory."""
    path = Path(path)
    write_atomically(path, render_page(compare_runs([read_run(Path(directory)) for directory in directories])))
    return path


def read_run(directory: Path) -> LoggedRun:
    """Its settings and metrics. Raises ValueError where there are none."""
    columns, steps = read_metrics(directory / "metrics.jsonl")
    if not steps:
        raise ValueError(f"{directory} has no metrics.jsonl with a step; legal: directories of runs")
    facts, settings = read_run_config(directory / "config.json")
    return LoggedRun(directory.resolve().name, facts.get("experiment", ""), facts, dict(settings), columns, steps)


def compare_runs(runs: Sequence[LoggedRun]) -> dict[str, Any]:
    """Everything the page shows of several runs, by the name that the script knows it by."""
    groups = group_runs(runs)
    labels = label_groups(groups)
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    series = [{"name": name, "lines": _lines(groups, name)} for name in names]
    themes = group_by_theme([each for each in series if each["lines"]])
    ordered = [each for theme in themes for each in theme["series"]]
    times = [[time_breakdown(run.columns) for run in group] for group in groups]
    memories = [[dict(peak_memory(run.columns)) for run in group] for group in groups]
    return {
        "title": _title(runs, groups),
        "headline": [],
        "steps": [min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)],
        "groups": [_group_facts(group, label) for group, label in zip(groups, labels, strict=True)],
        "results": _results(groups, ordered),
        "note": NOTE,
        "alarms": [{**found, "run": run.name} for run in runs for found in check_alarms(run.columns) if found["count"]],
        "rules": check_alarms({}),
        "curves": themes,
        "differences": {"rows": _differing(groups, lambda run: run.settings, NOT_SETTINGS)},
        "time": {"rows": _times(times)},
        "memory": {"rows": _memories(memories)},
        "environment": {"rows": _differing(groups, lambda run: run.facts, (), also_equal=True)},
        "config": [],
        "samples": None,
        "thinned": 0,
    }


def group_runs(runs: Sequence[LoggedRun]) -> list[list[LoggedRun]]:
    """Runs of one experiment whose settings differ in nothing but NOT_SETTINGS, in the order they were given."""
    groups: dict[tuple, list[LoggedRun]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in NOT_SETTINGS}
        groups.setdefault((run.experiment, tuple(sorted(settings.items()))), []).append(run)
    return list(groups.values())


def label_groups(groups: Sequence[Sequence[LoggedRun]]) -> list[str]:
    """A name for each group: the settings that tell it apart, or the name of its first run where those are too long."""
    rows = _differing(groups, lambda run: {"experiment": run.experiment, **run.settings}, NOT_SETTINGS)
    labels = []
    for i, group in enumerate(groups):
        parts = [cells[i] if name == "experiment" else f"{name} {cells[i]}" for name, _, cells in rows if cells[i]]
        label = " \u00b7 ".join(parts)
        labels.append(label if label and len(label) <= MAX_LABEL else group[0].name)
    return labels


def _title(runs: Sequence[LoggedRun], groups: Sequence) -> dict[str, Any]:
    experiments = list(dict.fromkeys(run.experiment for run in runs if run.experiment))
    lines = f"{len(groups)} line{'s' * (len(groups) != 1)}"
    return {
        "run": f"{len(runs)} runs in {lines}",
        "experiment": ", ".join(experiments),
        "facts": {},
        "written": None,
        "steps": max(run.steps[-1] for run in runs) + 1,
        "total": None,
    }


def _group_facts(group: Sequence[LoggedRun], label: str) -> dict[str, str]:
    return {
        "label": label,
        "runs": ", ".join(run.name for run in group),
        "seeds": ", ".join(run.settings.get("seed", "–") for run in group),
        "steps": ", ".join(str(run.steps[-1] + 1) for run in group),
    }


# ------------------------------------------------------------------------------------------------------------- curves


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Of n runs [n ..]: their mean, and the ends of its 95 % interval; None of a single run.

    >>> [end.round(3).tolist() for end in mean_and_interval(np.array([[1.0], [2.0], [3.0]]))]
    [[2.0], [-0.484], [4.484]]
    """
    n = len(values)
    mean = values.mean(axis=0)
    if n < 2:
        return mean, None, None
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def _lines(groups: Sequence[Sequence[LoggedRun]], name: str) -> list[dict]:
    """The line of each group whose runs all logged the metric."""
    lines = []
    for number, group in enumerate(groups):
        line = line_of([run.columns.get(name) for run in group])
        if line is not None:
            lines.append({"group": number, **line})
    return lines


def line_of(columns: Sequence[tuple[list, list] | None]) -> dict | None:
    """One metric of the runs of a group as a line, at the steps where all of them have a value; None if there is none.

    Returns: steps, values (means), low and high (absent of a single run), extent (least and largest value of a run).
    """
    if None in columns:
        return None
    finite = [{step: v for step, v in zip(*column, strict=True) if v is not None} for column in columns]
    steps = sorted(set.intersection(*(set(each) for each in finite)))
    if not steps:
        return None
    values = np.array([[each[step] for step in steps] for each in finite], np.float64)
    drawn = [smooth(np.array(steps), row) for row in values]
    if len(drawn[0][0]):
        steps = drawn[0][0].tolist()
        values = np.stack([row for _, row in drawn])
    mean, low, high = mean_and_interval(values)
    extent = [round_digits(values.min()), round_digits(values.max())]
    line = {
        "steps": [round_digits(step) for step in steps],
        "values": [round_digits(x) for x in mean],
        "extent": extent,
    }
    if low is not None:
        line |= {"low": [round_digits(x) for x in low], "high": [round_digits(x) for x in high]}
    return line


# ------------------------------------------------------------------------------------------------------------- tables


def _results(groups: Sequence[Sequence[LoggedRun]], series: Sequence[dict]) -> list:
    """[metric, [{mean, low, high} of each group]] of the last values of the headline's metrics."""
    return [[name, [_last_value(group, name) for group in groups]] for name in headline_names(series)]


def _last_value(group: Sequence[LoggedRun], name: str) -> dict:
    ends = [first_and_last(run.columns[name][1]) for run in group if name in run.columns]
    last = [end["last"] for end in ends if end]
    if not last:
        return {"mean": None, "low": None, "high": None}
    mean, low, high = mean_and_interval(np.array(last))
    return {
        "mean": round_digits(mean),
        "low": None if low is None else round_digits(low),
        "high": None if high is None else round_digits(high),
    }


def _differing(
    groups: Sequence[Sequence[LoggedRun]],
    facts: Callable[[LoggedRun], dict[str, str]],
    ignored: Sequence[str],
    also_equal: bool = False,
) -> list:
    """[name, "", [text of each group]] of the facts in which groups differ, or of all."""
    names = dict.fromkeys(name for group in groups for run in group for name in facts(run) if name not in ignored)
    rows = []
    for name in names:
        cells = [" / ".join(dict.fromkeys(facts(run).get(name, "") for run in group)) for group in groups]
        if also_equal or len(set(cells)) > 1:
            rows.append([name, "", cells])
    return rows


def _times(times: Sequence[Sequence[dict | None]]) -> list:
    """[name, unit, [number of each group]]: seconds a step, of all compilations, and shares of the phases."""
    rows = [
        ["a step, median", "seconds", [_mean(each["median"] for each in group if each) for group in times]],
        ["first step", "seconds", [_mean(each["first"] for each in group if each) for group in times]],
        ["in all", "seconds", [_mean(each["total"] for each in group if each) for group in times]],
        ["of all, compiling", "seconds", [_mean(each["compiling"] for each in group if each) for group in times]],
    ]
    phases = dict.fromkeys(phase["name"] for group in times for each in group if each for phase in each["phases"])
    for name in phases:
        rows.append([f"share of {name}", "share", [_mean(_shares(group, name)) for group in times]])
    return [row for row in rows if any(value is not None for value in row[2])]


def _shares(times: Sequence[dict | None], name: str) -> list[float]:
    return [phase["share"] for each in times if each for phase in each["phases"] if phase["name"] == name]


def _memories(memories: Sequence[Sequence[dict]]) -> list:
    names = dict.fromkeys(name for group in memories for each in group for name in each)
    return [
        [name, "bytes", [max((each.get(name, 0) for each in group), default=0) or None for group in memories]]
        for name in names
    ]


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return round_digits(sum(known) / len(known)) if known else None
