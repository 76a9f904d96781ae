"""The one place that writes numbers and prints lines.

Two files of a run directory grow by one JSON object a line, `step` first: `metrics.jsonl`, one line a step, and
`samples.jsonl`, one line an answer (`rljax.train.samples` says what is in it). Both are strict JSON: what is not finite
is null. Neither holds a time of day, so the files of a resumed run equal those of a run never stopped, byte for byte,
as far as the metrics do (`seconds` and `tokens_per_second` differ, as their names say).

A process killed while it writes leaves half a line at the end. Readers ignore it, and a resumed run drops it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

HEADLINES = ("reward", "length", "kl", "tokens_per_second")
SHORT = {"tokens_per_second": "tok/s"}  # how a headline is called on the screen
QUIET_SECONDS = 5.0  # between two plain lines

# Where nothing tells the width (a file, a notebook), tables may take 120 columns.
console = Console(highlight=False, force_jupyter=False, width=None if sys.stdout.isatty() else 120)


# -------------------------------------------------------------------------------------------------- words for people


def log_info(text: str = "", style: str | None = None, end: str = "\n") -> None:
    """Print a line as it is; above the progress bar while there is one."""
    console.print(text, style=style, end=end, markup=False, emoji=False, highlight=False, soft_wrap=True)


def table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of equal keys as a table; numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = Table(title=Text(title, "bold"), title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for name in names:
        numbers = all(isinstance(row.get(name, 0), int | float) for row in rows)
        out.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(_cell(row.get(name, ""))) for name in names))
    console.print(out)


def mute() -> None:
    """Print nothing from now on: what every process but the first of a pod asks for."""
    console.quiet = True


def short(value: float) -> str:
    """Three digits that count: 0.412, 3.9, 15,234, –."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """0:41, 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _cell(value) -> str:
    return short(value) if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


# ---------------------------------------------------------------------------------------------------- lines of JSON


def write_atomically(path: Path, text: str) -> None:
    """All of the file or none of it, whatever happens in between."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        _to_disk(file)
    os.replace(part, path)


def read_records(path: Path) -> Iterator[dict]:
    """The records of a .jsonl file, none if there is no file. A last line cut short is left out."""
    for _, record in _lines(path):
        yield record


def drop_from(path: Path, step: int) -> None:
    """Drop the records of `step` and later, and a last line cut short. The lines kept keep their bytes."""
    if not path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.writelines(line for line, record in _lines(path) if record["step"] < step)
        _to_disk(file)
    os.replace(part, path)


def _lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each complete line, newline included, with what it says."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                if not file.read(1):  # nothing follows: the writer was killed, or is writing this very line
                    return
                raise ValueError(f"{path}, line {number} is no JSON: {line[:80]!r}") from None
            yield line if line.endswith(b"\n") else line + b"\n", record


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _append(file, records: Iterable[Mapping]) -> None:
    for record in records:
        file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()


def _number(name: str, value) -> float:
    if np.ndim(value):
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}; a metric is one number")
    return float(value)


# ------------------------------------------------------------------------------------------------------- the resource


class Log:
    """The open files of a run and its progress on the screen.

    Args:
      directory: the run's. None writes and shows nothing: for every process but the first of a pod.
      total_steps: how many turns the loop makes; step 0 is the first.
      names: the metrics shown while it runs, in this order; those absent are left out.
      start: the first step that this process will write. Records of that step and later, left by a process that was
        killed, are dropped; TensorBoard is told to forget them. 0 starts afresh.
      also: further writers, called as `(step, metrics)`: `lambda step, metrics: wandb.log(metrics, step)`.
    """

    def __init__(
        self,
        directory: str | Path | None,
        *,
        total_steps: int,
        names: Sequence[str] = HEADLINES,
        start: int = 0,
        also: Sequence[Callable[[int, dict[str, float]], None]] = (),
    ):
        self._active = directory is not None
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import: only where it is needed

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / "metrics.jsonl", directory / "samples.jsonl"]
        for path in paths:
            drop_from(path, start)
        self._metrics, self._samples = (open(path, "a", encoding="utf-8") for path in paths)  # noqa: SIM115
        # The suffix keeps apart two event files of one second; purging 0 would hide nothing.
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=start or None, flush_secs=5, filename_suffix=f".{start}"
        )
        self._also, self._seen = also, {}
        self._progress = _Bar(total_steps, names, start) if live() else _Lines(total_steps, names)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, one TensorBoard event, one turn of the progress bar."""
        if not self._active:
            return
        if "step" in metrics:
            raise ValueError("'step' is no metric: it is the first argument of write")
        from tensorboardX.proto.summary_pb2 import Summary

        step, values = int(step), {name: _number(name, value) for name, value in metrics.items()}
        _append(self._metrics, [{"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}])
        # One event for all of them: add_scalar queues one each, and warns of every NaN.
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.file_writer.add_summary(Summary(value=scalars), step)
        for writer in self._also:
            writer(step, values)
        self._seen |= values  # what is measured now and then stays on the screen in between
        self._progress.show(step, self._seen)

    def samples(self, records: Sequence[Mapping]) -> None:
        """Lines of samples.jsonl, as `sample_records` makes them."""
        if self._active:
            _append(self._samples, records)

    def close(self) -> None:
        """Show the last step, flush and close. Closing twice does no harm."""
        if not self._active:
            return
        self._active = False
        self._progress.close()
        self._metrics.close()
        self._samples.close()
        self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# --------------------------------------------------------------------------------------------------------- progress


def live() -> bool:
    """Whether a line can be redrawn. FORCE_COLOR makes rich believe so of a file; the file knows better."""
    return console.is_interactive and console.file.isatty()


def _headline(names: Sequence[str], values: Mapping[str, float]) -> str:
    return "  ".join(f"{SHORT.get(name, name)} {short(values[name])}" for name in names if name in values)


class _Pace:
    """Time left, by the mean pace since the first step of this process, which also compiled."""

    def __init__(self, total: int):
        self.total, self.first = total, None

    def eta(self, done: int) -> str:
        now = time.monotonic()
        self.first = self.first or (now, done)
        since, begun = self.first
        return clock((now - since) / (done - begun) * max(self.total - done, 0)) if done > begun else "–"


class _Lines:
    """Progress where nothing can be redrawn: the first step, the last, and one every few seconds in between."""

    def __init__(self, total: int, names: Sequence[str]):
        self.total, self.names, self.pace = total, names, _Pace(total)
        self.shown, self.pending = None, None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        parts = (f"step {step + 1}/{self.total}", _headline(self.names, values), f"eta {self.pace.eta(step + 1)}")
        self.pending = "  ".join(filter(None, parts))
        if self.shown is None or step + 1 >= self.total or time.monotonic() - self.shown >= QUIET_SECONDS:
            self.close()

    def close(self) -> None:
        if self.pending:
            log_info(self.pending)
            self.shown, self.pending = time.monotonic(), None


class _Bar:
    """Progress on a terminal: one line, redrawn."""

    def __init__(self, total: int, names: Sequence[str], start: int):
        self.names, self.pace = names, _Pace(total)
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[headline]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("[dim]eta {task.fields[eta]}"),
        )
        self.progress = Progress(*columns, console=console, refresh_per_second=2)
        self.task = self.progress.add_task("", total=total, completed=start, headline="", eta="–")
        self.progress.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        fields = {"headline": _headline(self.names, values), "eta": self.pace.eta(step + 1)}
        self.progress.update(self.task, completed=step + 1, **fields)

    def close(self) -> None:
        self.progress.stop()
