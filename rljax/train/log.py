"""Metrics and messages: the files that a run logs to, and all that is printed.

Two files of a run directory hold one JSON object per line, `step` first: `metrics.jsonl`, one line per step, and
`samples.jsonl`, one line per completion (its format: `rljax.train.samples`). Both are strict JSON: values that are not
finite are null. Neither holds a time of day, so the files of a resumed run equal those of an uninterrupted one byte for
byte, as far as the metrics do: those whose names end in one of `MACHINE_METRICS` differ.

A process killed while it writes leaves half a line at the end. Readers ignore it, and a resumed run drops it.
"""

import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PROGRESS_METRICS = ("reward", "length", "kl", "tokens_per_second")
MACHINE_METRICS = ("seconds", "bytes", "tokens_per_second")  # they hang on the machine and its load
DISPLAY_NAMES = {"tokens_per_second": "tok/s"}  # on the progress line
PRINT_INTERVAL_SECONDS = 5.0  # between two progress lines where no line can be redrawn

MetricsWriter = Callable[[int, dict[str, float]], None]  # (step, metrics): a further logger, such as wandb's

# Where the width is unknown (a file, a notebook), tables may take 120 columns.
console = Console(highlight=False, force_jupyter=False, width=None if sys.stdout.isatty() else 120)


# -------------------------------------------------------------------------------------------------- messages


def printable(text: str) -> str:
    """The text with U+FFFD for each character that could control a terminal: models and data may hold any.

    Line ends, tabs, spaces and the joiners of letters and emoji are kept.

    >>> printable("a\\tb\\x1b[2J\\u202e")
    'a\\tb�[2J�'
    """
    kept = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"

    def is_harmless(c: str) -> bool:
        return c.isprintable() or c in kept or unicodedata.category(c) == "Zs"

    return "".join(c if is_harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def log_info(text: str = "", style: str | None = None, end: str = "\n") -> None:
    """Print a line as it is, markup too, but for control characters; above the progress bar while there is one."""
    text = printable(text)
    console.print(text, style=style, end=end, markup=False, emoji=False, highlight=False, soft_wrap=True)


def log_error(text: str) -> None:
    """Print "error: ..." on a process that prints nothing else."""
    silent, console.quiet = console.quiet, False
    log_info(f"error: {text}")
    console.quiet = silent


def silence() -> None:
    """Print nothing but errors from now on: for all processes of a run but the first."""
    console.quiet = True


def table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of equal keys as a table, numbers on the right. In a pipe the names in the first column stay whole."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    printed = Table(title=Text(printable(title), "bold"), title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for i, name in enumerate(names):
        numbers = all(isinstance(row.get(name, 0), int | float) for row in rows)
        longest = max(len(_format_cell(row.get(name, ""))) for row in rows)
        is_name = i == 0 and not console.file.isatty() and longest <= 2 * console.width // 3  # leave room for the rest
        justify = "right" if numbers else "left"
        printed.add_column(Text(printable(name)), justify=justify, overflow="fold", no_wrap=is_name)
    for row in rows:
        cells = [Text(_format_cell(row.get(name, ""))) for name in names]
        printed.add_row(*cells)
    console.print(printed)


def format_number(value: float) -> str:
    """Three significant digits, or all digits before the point: 0.412, 3.9, 15,234; – where not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:41, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value))


# -------------------------------------------------------------------------------------------------------- JSON lines


def write_atomically(path: Path, text: str) -> None:
    """Replace the file as a whole: a crash leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        _flush_to_disk(file)
    os.replace(part, path)


def read_records(path: Path) -> Iterator[dict]:
    """The records of a .jsonl file, none if there is no file. An incomplete last line is left out."""
    for _, record in _lines(path):
        yield record


def drop_records_from(path: Path, step: int, instead: Sequence[Mapping] = ()) -> None:
    """Drop the records of `step` and later, and an incomplete last line. Lines that are kept keep their bytes.

    instead: records that take their place.
    """
    if not path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.writelines(line for line, record in _lines(path) if record["step"] < step)
        file.writelines(_json_line(record).encode() for record in instead)
        _flush_to_disk(file)
    os.replace(part, path)


def _lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each complete line, newline included, and its record."""
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


def _flush_to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _append(file: TextIO, records: Iterable[Mapping]) -> None:
    for record in records:
        file.write(_json_line(record))
    file.flush()


def _json_line(record: Mapping) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _scalar(name: str, value: Any) -> float:
    if np.ndim(value):
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}; a metric is one number")
    return float(value)


# ------------------------------------------------------------------------------------------------------- the log files


class Log:
    """The open log files of a run and its progress line.

    Args:
      directory: the run's. None writes and prints nothing: for all processes of a pod but the first.
      total_steps: steps of the loop; step 0 is the first.
      progress_metrics: metrics on the progress line, in this order; those that are not logged are left out.
      start: the first step that this process will write. Records of that step and later, left by a process that was
        killed, are dropped; TensorBoard is told to forget them. 0 starts from an empty log.
      writers: further loggers, called as `(step, metrics)`: `lambda step, metrics: wandb.log(metrics, step)`.
      compiling: says what is being compiled and for how long, "" where nothing is; shown where a line can be redrawn.
    """

    def __init__(
        self,
        directory: str | Path | None,
        *,
        total_steps: int,
        progress_metrics: Sequence[str] = PROGRESS_METRICS,
        start: int = 0,
        writers: Sequence[MetricsWriter] = (),
        compiling: Callable[[], str] = str,
    ):
        self._active = directory is not None
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import: only where it is needed

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = _open_records(directory / "metrics.jsonl", start)
        self._samples = _open_records(directory / "samples.jsonl", start)
        self._events = SummaryWriter(
            str(directory / "tensorboard"),
            purge_step=start or None,  # purging from step 0 would hide nothing
            flush_secs=5,
            filename_suffix=f".{start}",  # tells apart two event files of the same second
        )
        self._writers = writers
        self._latest: dict[str, float] = {}
        if is_interactive():
            self._progress = _ProgressBar(total_steps, progress_metrics, start, compiling)
        else:
            self._progress = _ProgressLines(total_steps, progress_metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl and a TensorBoard event, and update the progress line."""
        if not self._active:
            return
        if "step" in metrics:
            raise ValueError("'step' is no metric: it is the first argument of write")
        step = int(step)
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        _append(self._metrics, [{"step": step, **_finite(values)}])
        self._send(step, values)
        self._progress.update(step, self._latest)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of a step, the last one that was written, be it by an earlier process.

        Numbers that the line has already stay as they are.
        """
        if not self._active:
            return
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        path = Path(self._metrics.name)
        line = {"step": step}
        for record in read_records(path):
            line = record if record["step"] == step else line
        values = {name: value for name, value in values.items() if line.get(name) is None}
        self._metrics.close()
        drop_records_from(path, step, instead=[line | _finite(values)])
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._send(step, values)
        if not values.keys().isdisjoint(self._progress.names):
            self._progress.update(step, self._latest)

    def _send(self, step: int, values: dict[str, float]) -> None:
        """To TensorBoard and further writers."""
        self._write_event(step, values)
        for writer in self._writers:
            writer(step, values)
        self._latest |= values  # a metric that is measured only now and then stays on the progress line

    def _write_event(self, step: int, values: Mapping[str, float]) -> None:
        """One TensorBoard event for all metrics: add_scalar queues one for each, and warns of every NaN."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.file_writer.add_summary(Summary(value=scalars), step)

    def samples(self, records: Sequence[Mapping]) -> None:
        """Write lines of samples.jsonl, as `sample_records` makes them, and show the best and the worst of them."""
        if self._active:
            _append(self._samples, records)
            self._progress.show_samples(best_and_worst_lines(records))

    def close(self) -> None:
        """Print the last step, flush and close. Closing twice does no harm."""
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


def _open_records(path: Path, start: int) -> TextIO:
    """The file, open for appending, without the records of `start` and later."""
    drop_records_from(path, start)
    return open(path, "a", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- progress line


def is_interactive() -> bool:
    """Whether a line can be redrawn. FORCE_COLOR makes rich believe so of a file too, so the file is asked as well."""
    return console.is_interactive and console.file.isatty()


def best_and_worst_lines(records: Sequence[Mapping], width: int = 100) -> list[str]:
    """A line each for the records of `sample_records` with the highest and the lowest reward; none without a reward.

    >>> records = [{"reward": r, "prompt": "1+1=", "completion": c} for r, c in ((0.0, "3\\n"), (1.0, "2"), (None, ""))]
    >>> best_and_worst_lines(records)
    ['  best 1: 1+1= → 2', '  worst 0: 1+1= → 3']
    """
    scored = [record for record in records if record.get("reward") is not None]
    if not scored:
        return []
    chosen = {"best": max(scored, key=lambda record: record["reward"])}
    lowest = min(scored, key=lambda record: record["reward"])
    if lowest["reward"] < chosen["best"]["reward"]:
        chosen["worst"] = lowest
    lines = []
    for name, record in chosen.items():
        prompt = _beginning(printable(" ".join(record["prompt"].split()))[::-1], width // 3)[::-1]  # its end
        completion = _beginning(printable(" ".join(record["completion"].split())), width)
        lines.append(f"  {name} {format_number(record['reward'])}: {prompt} → {completion}")
    return lines


def _beginning(text: str, width: int) -> str:
    """At most `width` characters, the last one … where some were left out: whole words, unless one is very long."""
    if len(text) <= width:
        return text
    word_end = text.rfind(" ", width // 2, width)
    return text[: word_end if word_end > 0 else width - 1] + "…"


def _format_metrics(names: Sequence[str], values: Mapping[str, float]) -> str:
    rounded = {name: 0.0 if abs(values[name]) < 1e-6 else values[name] for name in names if name in values}
    return "  ".join(f"{DISPLAY_NAMES.get(name, name)} {format_number(value)}" for name, value in rounded.items())


class _RemainingTime:
    """Time left, by the mean pace since the first step of this process, which also compiled."""

    def __init__(self, total: int):
        self.total = total
        self.started_at: float | None = None
        self.started_with = 0  # steps done by then

    def estimate(self, done: int) -> str:
        now = time.monotonic()
        if self.started_at is None:
            self.started_at = now
            self.started_with = done
        if done <= self.started_with:
            return "–"
        seconds_per_step = (now - self.started_at) / (done - self.started_with)
        return format_duration(seconds_per_step * max(self.total - done, 0))


class _ProgressLines:
    """Progress where no line can be redrawn: the first step, the last, and one every few seconds in between."""

    def __init__(self, total: int, names: Sequence[str]):
        self.total = total
        self.names = names
        self.remaining = _RemainingTime(total)
        self.printed_at: float | None = None
        self.pending = ""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        remaining = self.remaining.estimate(step + 1)
        parts = [f"step {step + 1}/{self.total}", _format_metrics(self.names, values), f"eta {remaining}"]
        self.pending = "  ".join(part for part in parts if part)
        is_first = self.printed_at is None
        is_last = step + 1 >= self.total
        if is_first or is_last or time.monotonic() - self.printed_at >= PRINT_INTERVAL_SECONDS:
            self.close()

    def show_samples(self, lines: Sequence[str]) -> None:
        for line in lines:
            log_info(line, style="dim")

    def close(self) -> None:
        if self.pending:
            log_info(self.pending)
            self.printed_at = time.monotonic()
            self.pending = ""


class _Compiling(ProgressColumn):
    """What is being compiled, and for how long."""

    def __init__(self, describe: Callable[[], str]):
        self.describe = describe
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self.describe(), "yellow")


class _WithSamples(Progress):
    """The progress line, and under it the best and the worst completion that were sampled last."""

    lines: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in self.lines)


class _ProgressBar:
    """Progress on a terminal: one line, redrawn, with two samples under it."""

    def __init__(self, total: int, names: Sequence[str], start: int, compiling: Callable[[], str]):
        self.names = names
        self.remaining = _RemainingTime(total)
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("[dim]eta {task.fields[eta]}"),
            _Compiling(compiling),
        )
        self.progress = _WithSamples(*columns, console=console, refresh_per_second=2)
        self.task = self.progress.add_task("", total=total, completed=start, metrics="", eta="–")
        self.progress.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        metrics = _format_metrics(self.names, values)
        self.progress.update(self.task, completed=step + 1, metrics=metrics, eta=self.remaining.estimate(step + 1))

    def show_samples(self, lines: Sequence[str]) -> None:
        self.progress.lines = lines

    def close(self) -> None:
        self.progress.stop()
