"""A run as one page to look at: `report.html`, made of config.json, metrics.jsonl and samples.jsonl.

The page is one file that opens from a disk without network. Python chooses and thins what goes in; `report.js` draws it
from a block of JSON. What a model wrote is hostile: it stands only in that block, with every character escaped that
HTML could take for markup, it enters the page as text, and the page's content security policy runs no script but ours.

Absent files are shown as absent; half a line at the end of a file that is being written is ignored.
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

import numpy as np

from rljax.train.log import read_records, write_atomically

POINTS = 1000  # of one curve
SAMPLED_STEPS = 24  # on the page, evenly chosen
SAMPLED_BYTES = 24_000_000  # of answers on the page

# Where a metric stands, by the first word of its name that is in the list; within a theme, in the order of the words.
THEMES = {
    "Reward": ("held_out", "eval", "accuracy", "pass", "reward", "score", "return", "no_signal", "frac_reward_failed"),
    "Policy": ("kl", "entropy", "clip", "ratio", "logp", "logprob", "gap", "advantage", "importance"),
    "Answers": ("length", "ended", "terminated", "truncated", "answer", "completion"),
    "Optimisation": (
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
UNITS = ("second", "seconds", "bytes")  # a name that ends so is about speed, whatever it begins with
SPREAD = ("_std", "_max", "_min")  # these follow the metric they belong to, and are no headlines


def write_report(directory: str | Path) -> Path:
    """Write report.html into a run's directory, whole or not at all, and say where it is."""
    directory = Path(directory)
    path = directory / "report.html"
    write_atomically(path, page(collect(directory)))
    return path


def collect(directory: Path) -> dict:
    """Everything the page shows: title, headline, steps (first and last), curves, samples, config, thinned."""
    columns, steps = read_metrics(directory / "metrics.jsonl")
    series = [curve(name, *columns[name]) for name in columns]
    themes = group(series)
    facts, config = read_run_config(directory / "config.json")
    return {
        "title": _title(directory, facts, config, steps),
        "headline": headline([each for theme in themes for each in theme["series"]], columns),
        "steps": [steps[0], steps[-1]] if steps else [0, 0],
        "curves": themes,
        "samples": read_samples(directory / "samples.jsonl"),
        "config": config,
        "thinned": POINTS if any(len(values) > POINTS for _, values in columns.values()) else 0,
    }


# ---------------------------------------------------------------------------------------------------------- the page


def page(data: dict) -> str:
    """The template filled in, once: what is filled in is not searched for further places to fill."""
    here = Path(__file__)
    script = here.with_name("report.js").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(data["title"]["run"]),
        "SCRIPT_HASH": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": embed(data),
        "SCRIPT": script,
    }
    template = here.with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def embed(data) -> str:
    """Strict JSON that HTML cannot take for markup. Pure ASCII, so U+2028 and lone surrogates are escaped as well.

    >>> embed("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(directory: Path, facts: dict, config: list, steps: Sequence[int]) -> dict:
    total = dict(config).get("steps", "")
    metrics = directory / "metrics.jsonl"
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC") if steps else None
    return {
        "run": directory.resolve().name,
        "experiment": facts.pop("experiment", None),
        "facts": facts,
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
        return {}, list(_flat(document, ""))
    facts = {name: str(value) for name, value in document.items() if value is not None}
    return facts, list(_flat(settings, ""))


def _flat(tree: dict, prefix: str):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)]


# ------------------------------------------------------------------------------------------------------------ curves


def read_metrics(path: Path) -> tuple[dict[str, tuple[list, list]], list[int]]:
    """Name -> (steps, values with None where not finite), in the order met; and the steps logged."""
    columns, steps = {}, []
    for record in read_records(path):
        step = record.pop("step")
        steps.append(step)
        for name, value in record.items():
            at, values = columns.setdefault(name, ([], []))
            at.append(step)
            values.append(value)
    return columns, steps


def curve(name: str, steps: Sequence[int], values: Sequence[float | None]) -> dict:
    """One metric as it is drawn: thinned, smoothed, its missing values apart."""
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    s, v = np.array([s for s, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float64)
    nulls = [s for s, v in zip(steps, values, strict=True) if v is None]
    at, kept = thin(s, v)
    return {
        "name": name,
        "steps": at.tolist(),
        "values": [_round(x) for x in kept],
        "smooth": [[_round(x) for x in line] for line in smooth(s, v)],
        "last": _round(values[-1]) if values[-1] is not None else None,
        "missing": len(nulls),
        "nulls": nulls[:: len(nulls) // 50 + 1],
    }


def thin(steps: np.ndarray, values: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: the first, the last, and the lowest and highest of each of equal stretches between."""
    if len(values) <= limit:
        return steps, values
    edges = np.linspace(1, len(values) - 1, (limit - 2) // 2 + 1).astype(int)
    keep = {0, len(values) - 1}
    for a, b in pairwise(edges):
        keep |= {a + int(values[a:b].argmin()), a + int(values[a:b].argmax())}
    keep = sorted(keep)
    return steps[keep], values[keep]


def smooth(steps: np.ndarray, values: np.ndarray, bins: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A centred Gaussian mean, a sixtieth of the curve wide: no lag. Empty for a curve too short to need one."""
    if len(values) < 24:
        return np.array([]), np.array([])
    parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
    s, v = (np.array([x[part].mean() for part in parts]) for x in (steps, values))
    width = max(1.0, len(v) / 60)
    offsets = np.arange(-math.ceil(3 * width), math.ceil(3 * width) + 1)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    pad = len(offsets) // 2
    total, weight = (np.convolve(np.pad(x, pad), kernel, "valid") for x in (v, np.ones_like(v)))
    return s, total / weight


def theme_of(name: str) -> tuple[str, int]:
    """The theme of a metric, and its rank there.

    >>> theme_of("loss/kl"), theme_of("reward_seconds"), theme_of("maze/walls")
    (('Optimisation', 0), ('Speed', 2), ('maze', 0))
    """
    words = "_" + re.sub(r"\W+", "_", name.lower())
    if words.split("_")[-1] in UNITS and "_per_" not in words:
        return "Speed", 2
    found = [
        (words.find("_" + word), theme, rank)
        for theme, ranked in THEMES.items()
        for rank, word in enumerate(ranked)
        if "_" + word in words
    ]
    if found:
        return min(found)[1:]
    return (name.split("/")[0] if "/" in name else "Other"), 0


def group(series: Sequence[dict]) -> list[dict]:
    """Curves by theme, the important ones first; prefixes that no theme knows follow, the rest last."""
    themes = {title: [] for title in THEMES}
    for each in series:
        title, rank = theme_of(each["name"])
        themes.setdefault(title, []).append((rank, each["name"].endswith(SPREAD), each))
    themes["Other"] = themes.pop("Other", [])
    ordered = {title: [each for *_, each in sorted(found, key=lambda x: x[:2])] for title, found in themes.items()}
    return [{"title": title, "series": found} for title, found in ordered.items() if found]


def headline(series: Sequence[dict], columns: dict) -> list[dict]:
    """First -> last of at most six main metrics: what is rewarded, then how the policy moves, then the speed."""
    names = [each["name"] for each in series if not each["name"].endswith(SPREAD)]
    chosen = [name for name in names if theme_of(name)[0] == "Reward"][:3]
    for words in (("kl_sequence", "kl"), ("entropy",), ("length",), ("tokens_per_second",)):
        chosen += [name for word in words for name in names if name.startswith(word)][:1]
    out = []
    for name in chosen[:6]:
        values = [v for v in columns[name][1] if v is not None]
        if values:
            over = min(5, math.ceil(len(values) / 20))
            ends = [_round(np.mean(part)) for part in (values[:over], values[-over:])]
            out.append({"name": name, "first": ends[0], "last": ends[1], "over": over})
    return out


def _round(value: float) -> float:
    return float(f"{value:.6g}")


# ----------------------------------------------------------------------------------------------------------- answers


def read_samples(path: Path, limit: int = SAMPLED_STEPS, size: int = SAMPLED_BYTES) -> dict:
    """The answers of at most `limit` steps, first and last among them; of each the groups that fit its share of `size`.

    Returns: {"steps": [{"step", "records", "groups_left_out"}], "left_out": number of steps}.
    """
    places = _places(path)
    chosen = evenly(sorted(places), limit)
    steps = [_sampled(path, step, places[step], size // len(chosen)) for step in chosen]
    return {"steps": steps, "left_out": len(places) - len(steps)}


def evenly(items: Sequence, limit: int) -> list:
    """At most `limit` of them, the first and the last among them.

    >>> evenly(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _places(path: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> (offset, bytes) of its lines, unparsed: long runs write more answers than memory should hold."""
    places, offset = {}, 0
    if not path.exists():
        return places
    with open(path, "rb") as file:
        for line in file:
            start = re.match(rb'\{"step": (\d+),', line)
            if start and line.endswith(b"}\n"):  # else cut short
                places.setdefault(int(start[1]), []).append((offset, len(line)))
            offset += len(line)
    return places


def _sampled(path: Path, step: int, places: Sequence[tuple[int, int]], size: int) -> dict:
    groups = {}
    with open(path, "rb") as file:
        for offset, length in places:
            file.seek(offset)
            record = json.loads(file.read(length))
            used, records = groups.setdefault(record["group"], [0, []])
            groups[record["group"]] = [used + length, [*records, record]]
    kept, used = [], 0
    for i, (length, records) in enumerate(groups.values()):
        used += length
        if i and used > size:
            return {"step": step, "records": kept, "groups_left_out": len(groups) - i}
        kept += records
    return {"step": step, "records": kept, "groups_left_out": 0}
