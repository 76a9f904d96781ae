"""The report of a run: `report.html`, made of config.json, metrics.jsonl and samples.jsonl.

The page is one file that opens from a disk without network. Python selects and thins the data; `report.js` draws them
from a block of JSON. Text that a model wrote is not trusted: it stands only in that block, with every character escaped
that HTML could take for markup, it enters the page as text, and the page's content security policy allows no script but
ours.

A missing file leaves its part of the page empty; half a line at the end of a file that is being written is ignored.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rljax.train.alarms import check_alarms
from rljax.train.log import read_records, write_atomically
from rljax.train.samples import read_samples

MAX_POINTS = 1000  # of one curve
SCRIPTS = ("report.js", "report_curves.js", "report_samples.js", "report_tokens.js", "report_page.js")  # in this order
TITLE_FACTS = ("git", "jax", "devices")  # under the title; the others stand in the environment

# A metric belongs to the theme of the first word of its name that is listed here; a theme's metrics follow the order of
# its words.
THEMES = {
    "Reward": ("eval", "accuracy", "pass", "reward", "score", "return", "solved", "frac_reward"),
    "Policy": ("kl", "entropy", "clip", "ratio", "ess", "logp", "logprob", "gap", "advantage", "importance"),
    "Completions": ("length", "ended", "terminated", "truncated", "frac_empty", "completion", "answer"),
    "Optimization": (
        "loss",
        "grad",
        "value",
        "explained",
        "learning_rate",
        "lr",
        "update",
        "param",
        "norm",
        "optimizer",
    ),
    "Speed": ("tokens_per_second", "seconds", "second", "bytes", "flops", "utilisation", "tokens"),
}
NO_PART_OF_A_STEP = ("compile_seconds", "samples_seconds")  # within its parts; beside it
UNITS = ("second", "seconds", "bytes")  # a name that ends so is about speed, whatever it begins with
SPREAD = ("_std", "_max", "_min")  # these follow the metric that they belong to, and are not in the headline


def write_report(directory: str | Path) -> Path:
    """Write report.html into a run's directory, atomically, and return its path."""
    directory = Path(directory)
    path = directory / "report.html"
    write_atomically(path, render_page(collect(directory)))
    return path


def collect(directory: Path) -> dict:
    """Everything the page shows of one run, by the name that the script knows it by."""
    columns, steps = read_metrics(directory / "metrics.jsonl")
    series = [curve(name, *columns[name]) for name in columns]
    themes = group_by_theme(series)
    ordered = [each for theme in themes for each in theme["series"]]
    facts, config = read_run_config(directory / "config.json")
    longest = max((len(values) for _, values in columns.values()), default=0)
    return {
        "title": _title(directory, facts, config, steps),
        "headline": headline(ordered, columns),
        "steps": [steps[0], steps[-1]] if steps else [0, 0],
        "alarms": check_alarms(columns) if steps else [],
        "curves": themes,
        "samples": read_samples(directory / "samples.jsonl"),
        "time": time_breakdown(columns),
        "memory": peak_memory(columns),
        "environment": list(facts.items()),
        "config": config,
        "thinned": MAX_POINTS if longest > MAX_POINTS else 0,
    }


# ---------------------------------------------------------------------------------------------------------- the page


def render_page(data: dict) -> str:
    """The template with its placeholders replaced in one pass, so that inserted text is not searched for others."""
    here = Path(__file__)
    script = "\n".join(here.with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(data["title"]["run"]),
        "SCRIPT_HASH": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": embed_json(data),
        "SCRIPT": script,
    }
    template = here.with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def embed_json(data: Any) -> str:
    """Strict JSON that HTML cannot take for markup. Pure ASCII, so U+2028 and lone surrogates are escaped as well.

    >>> embed_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(directory: Path, facts: dict, config: list, steps: Sequence[int]) -> dict:
    total = dict(config).get("steps", "")
    metrics = directory / "metrics.jsonl"
    written = None
    if steps:
        written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "run": directory.resolve().name,
        "experiment": facts.get("experiment"),
        "facts": {name: facts[name] for name in TITLE_FACTS if name in facts},
        "written": written,
        "steps": steps[-1] + 1 if steps else 0,
        "total": int(total) if total.isdecimal() else None,
    }


# ----------------------------------------------------------------------------------------------------- configuration


def read_run_config(path: Path) -> tuple[dict[str, str], list[list[str]]]:
    """The facts for the title, and (dotted name, value) of every setting.

    config.json is {"config": {settings}, fact: value ..} (experiment, git, jax ..), or the settings alone.
    """
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = document.pop("config", None)
    if not isinstance(settings, dict):
        return {}, _settings_as_text(document)
    facts = {name: str(value) for name, value in document.items() if value is not None}
    return facts, _settings_as_text(settings)


def flatten_settings(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as on the command line."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten_settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changed_settings(before: dict, now: dict, ignored: Sequence[str] = ()) -> str:
    """The settings that differ, as "seed = 0, now 1; ..."; empty where none does.

    ignored: names of settings, dotted or without their blocks, and of blocks, that may differ.
    """
    before = flatten_settings(before)
    now = flatten_settings(now)
    names = sorted(before.keys() | now.keys())
    compared = [name for name in names if not {name, *name.split(".")} & set(ignored)]
    changed = [name for name in compared if before.get(name) != now.get(name)]
    return "; ".join(f"{name} = {before.get(name)!r}, now {now.get(name)!r}" for name in changed)


def _settings_as_text(settings: dict) -> list[list[str]]:
    flat = flatten_settings(settings)
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in flat.items()]


# ------------------------------------------------------------------------------------------------------------ curves


def read_metrics(path: Path) -> tuple[dict[str, tuple[list, list]], list[int]]:
    """Name -> (steps, values with None where not finite), in the order met; and the steps logged."""
    columns: dict[str, tuple[list, list]] = {}
    steps = []
    for record in read_records(path):
        step = record.pop("step")
        steps.append(step)
        for name, value in record.items():
            metric_steps, values = columns.setdefault(name, ([], []))
            metric_steps.append(step)
            values.append(value)
    return columns, steps


def curve(name: str, steps: Sequence[int], values: Sequence[float | None]) -> dict:
    """One metric as it is drawn: thinned, smoothed, with the steps where its value is missing."""
    finite = [value is not None for value in values]
    finite_steps = np.array([step for step, known in zip(steps, finite, strict=True) if known], np.int64)
    finite_values = np.array([value for value in values if value is not None], np.float64)
    nulls = [step for step, known in zip(steps, finite, strict=True) if not known]
    thinned_steps, thinned_values = thin(finite_steps, finite_values)
    smooth_steps, smooth_values = smooth(finite_steps, finite_values)
    return {
        "name": name,
        "steps": thinned_steps.tolist(),
        "values": _round_all(thinned_values),
        "smooth": [_round_all(smooth_steps), _round_all(smooth_values)],
        "last": None if values[-1] is None else round_digits(values[-1]),
        "missing": len(nulls),
        "nulls": nulls[:: len(nulls) // 50 + 1],
    }


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: the first, the last, and the extremes of equal segments in between."""
    if len(values) <= limit:
        return steps, values
    edges = np.linspace(1, len(values) - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges):
        segment = values[start:end]
        kept.add(start + int(segment.argmin()))
        kept.add(start + int(segment.argmax()))
    indices = sorted(kept)
    return steps[indices], values[indices]


def smooth(steps: np.ndarray, values: np.ndarray, bins: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A centered Gaussian mean, a sixtieth of the curve wide, so without lag. Empty for fewer than 24 values."""
    if len(values) < 24:
        return np.array([]), np.array([])
    parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
    binned_steps = np.array([steps[part].mean() for part in parts])
    binned_values = np.array([values[part].mean() for part in parts])
    width = max(1.0, len(binned_values) / 60)
    offsets = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    pad = len(offsets) // 2
    total = np.convolve(np.pad(binned_values, pad), kernel, "valid")
    weight = np.convolve(np.pad(np.ones_like(binned_values), pad), kernel, "valid")
    return binned_steps, total / weight


def theme_of(name: str) -> tuple[str, int]:
    """The theme of a metric, and its rank there.

    >>> theme_of("loss/kl"), theme_of("reward_seconds"), theme_of("maze/walls")
    (('Optimization', 0), ('Speed', 2), ('maze', 0))
    """
    words = "_" + re.sub(r"\W+", "_", name.lower())
    if words.split("_")[-1] in UNITS and "_per_" not in words:
        return "Speed", 2
    found = []
    for theme, theme_words in THEMES.items():
        for rank, word in enumerate(theme_words):
            if f"_{word}" in words:
                found.append((words.find(f"_{word}"), theme, rank))
    if found:
        _, theme, rank = min(found)
        return theme, rank
    prefix, slash, _ = name.partition("/")
    return (prefix if slash else "Other"), 0


def group_by_theme(series: Sequence[dict]) -> list[dict]:
    """Curves by theme, the important ones first; then those with a prefix of their own, then the others."""
    themes: dict[str, list[dict]] = {title: [] for title in THEMES}
    for each in series:
        title, _ = theme_of(each["name"])
        themes.setdefault(title, []).append(each)
    themes["Other"] = themes.pop("Other", [])
    return [{"title": title, "series": sorted(found, key=_order_in_theme)} for title, found in themes.items() if found]


def _order_in_theme(series: dict) -> tuple[int, bool]:
    _, rank = theme_of(series["name"])
    return rank, series["name"].endswith(SPREAD)


def headline_names(series: Sequence[dict]) -> list[str]:
    """At most six metrics: rewards, how far the policy moved, lengths, speed."""
    names = [each["name"] for each in series if not each["name"].endswith(SPREAD)]
    chosen = [name for name in names if theme_of(name)[0] == "Reward"][:3]
    for prefixes in (("kl_sequence", "kl"), ("entropy",), ("length",), ("tokens_per_second",)):
        matching = [name for prefix in prefixes for name in names if name.startswith(prefix)]
        chosen += matching[:1]
    return chosen[:6]


def headline(series: Sequence[dict], columns: dict) -> list[dict]:
    """First and last values of the headline's metrics."""
    entries = []
    for name in headline_names(series):
        ends = first_and_last(columns[name][1]) if name in columns else None
        if ends:
            entries.append({"name": name, **ends})
    return entries


def first_and_last(values: Sequence[float | None]) -> dict | None:
    """Means of the first and of the last values, a twentieth of them and at most five (`window`); None of no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    window = min(5, math.ceil(len(known) / 20))
    first = round_digits(np.mean(known[:window]))
    last = round_digits(np.mean(known[-window:]))
    return {"first": first, "last": last, "window": window}


def round_digits(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def _round_all(values: np.ndarray) -> list[float]:
    return [round_digits(value) for value in values]


# ---------------------------------------------------------------------------------------------------- time and memory


def time_breakdown(columns: dict) -> dict | None:
    """Where the seconds of all steps went, None where none were logged.

    Returns: {"steps", "total", "median", "first"} of whole steps in seconds, "compiling" of all of them (None: not
    logged), and "phases": {"name", "total", "median", "share"} of each metric NAME_seconds, and of what is left, in the
    steps after the first, which compiles.
    """
    if "seconds" not in columns:
        return None
    seconds = [value for value in columns["seconds"][1] if value is not None]
    compiling = columns.get("compile_seconds")
    later = sum(_after_first(columns, "seconds"))
    phases = []
    for name in columns:
        is_part = name.endswith("_seconds") and name not in NO_PART_OF_A_STEP
        values = _after_first(columns, name) if is_part else []
        if values:
            phases.append(_phase(name.removesuffix("_seconds"), values, later))
    if phases:
        left = max(0.0, later - sum(phase["total"] for phase in phases))
        phases.append({**_phase("everything else", [left], later), "median": None})
    return {
        "steps": len(seconds),
        "total": round_digits(sum(seconds)),
        "median": round_digits(float(np.median(seconds))),
        "first": round_digits(seconds[0]),
        "compiling": None if compiling is None else round_digits(sum(value or 0.0 for value in compiling[1])),
        "phases": phases,
    }


def _after_first(columns: dict, name: str) -> list[float]:
    """The values of a metric but those of the first step, unless there is no other."""
    first, *others = columns["seconds"][0]
    return [value or 0.0 for step, value in zip(*columns[name], strict=True) if step != first or not others]


def _phase(name: str, values: Sequence[float], total: float) -> dict:
    return {
        "name": name,
        "total": round_digits(sum(values)),
        "median": round_digits(float(np.median(values))),
        "share": sum(values) / total if total else 0.0,
    }


def peak_memory(columns: dict) -> list[list]:
    """(name, bytes): the largest value logged of each metric peak_NAME_bytes."""
    peaks = []
    for name, (_, values) in columns.items():
        found = re.fullmatch(r"peak_(\w+)_bytes", name)
        known = [value for value in values if value is not None]
        if found and known:
            peaks.append([found[1], max(known)])
    return peaks
