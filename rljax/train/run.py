"""A run directory: lock, settings, log, checkpoints, signals. The only resource object of an experiment.

    config.json     the settings, the experiment, the git revision
    inputs.json     a digest of each file that the run reads: models and rows
    experiment.py   the experiment's own source
    functions/      the source of the functions handed in and the git revision, as `rljax.train.provenance` keeps them
    metrics.jsonl, tensorboard/, samples.jsonl, report.html
    trackers.json   where metrics go to wandb or trackio too: the ids of the run there
    checkpoints/

Running the same command again resumes from the newest undamaged checkpoint. What was logged after it is dropped and
computed again, and the result is bit-identical to that of an uninterrupted run.

Where several processes run the script, process 0 alone writes the directory, and all take part in checkpoints. A run
may go on with another number of processes and on another mesh: its numbers are then the same to rounding.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.train import distributed
from rljax.train.checkpoint import Checkpoints
from rljax.train.compile_watch import CompileWatch
from rljax.train.inputs import describe_changed_inputs, file_digests
from rljax.train.log import PROGRESS_METRICS, Log, log_info, write_atomically
from rljax.train.machine import environment, peak_bytes
from rljax.train.metrics import MUST_BE_FINITE
from rljax.train.provenance import git_revision, record_sources, run_sources
from rljax.train.report import changed_settings, flatten_settings, write_report
from rljax.train.samples import Decode, sample_records, shown_rows
from rljax.train.trackers import Tracker, open_tracker
from rljax.train.watchdog import Watchdog, sign_of_life
from rljax.types import Array, Batch, PromptBatch, TrainState

LINGER_SECONDS = 10.0  # of process 0 when the watchdog ends all of them
SHARED_SECONDS = 90.0  # for a new file to be seen by other hosts: NFS remembers for a minute what a directory held


class _Timed:
    """A function that waits for its result and adds the seconds to `seconds[name]`; its attributes are as before."""

    def __init__(self, function: Callable, name: str, seconds: dict[str, float]):
        self._function = function
        self._name = name
        self._seconds = seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        result = jax.block_until_ready(self._function(*args, **kwargs))
        sign_of_life()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.monotonic() - began
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _fetch_shown(
    batch: Batch, token_columns: Mapping[str, Array] | None
) -> tuple[np.ndarray, Batch, Mapping[str, Array] | None]:
    """The rows of a batch that samples show, their indices first: on the host, without what no sample has."""
    group = np.asarray(distributed.fetch(batch.traj.group))
    rows = shown_rows(group)
    traj = batch.traj.replace(dist=None, routing=None, support=None)
    shown = (batch.replace(traj=traj, coefficients={}), token_columns)
    if len(rows) < len(group):
        shown = jax.tree.map(lambda x: x[rows] if isinstance(x, np.ndarray) else _take_rows(x, rows), shown)
    return rows, *distributed.fetch(shown)


@jax.jit
def _take_rows(x: Array, rows: Array) -> Array:
    return x[rows]


class Run:
    """One training run in one directory.

        with Run(directory, config, steps=cfg.steps, source=__file__) as run:
            state = run.restore(state)
            for step in run.steps(state.step):
                ...
                run.record(step, state, metrics)

    Args:
      config: the settings, as JSON. A directory that holds a run with other settings is refused and left unchanged.
      inputs: what the run reads: files, and directories of models. A directory whose run began with files of other
        content is refused like one of other settings.
      steps: of the loop. save_every: steps between checkpoints (the last step is always saved).
      log_samples_every: steps between samples of completions. progress_metrics: metrics on the progress line.
      placement: names of settings, or of blocks of them, that say where arrays lie and how work is cut: they may be
        others when a run is resumed.
      logistics: names of settings that say where, how patiently and how often others are asked and files are written:
        they may be others too, but a text, an address say, may not come or go. One line says which have changed.
      watchdog: ends the process where no step ends any more; by default `Watchdog()`.
      functions: what the run calls (an algorithm, verifiers), by name. Their source is kept. A run that is resumed with
        another source prints a warning and keeps that source too.
    """

    def __init__(
        self,
        directory: str | Path,
        config: dict[str, Any],
        *,
        steps: int,
        source: str | None = None,
        functions: Mapping[str, Any] | None = None,
        inputs: Sequence[str | Path] = (),
        save_every: int = 50,
        log_samples_every: int = 20,
        progress_metrics: Sequence[str] = PROGRESS_METRICS,
        placement: Sequence[str] = (),
        logistics: Sequence[str] = (),
        watchdog: Watchdog | None = None,
    ):
        intervals = {"steps": steps, "save_every": save_every, "log_samples_every": log_samples_every}
        if min(intervals.values()) < 1:
            shown = ", ".join(f"{name} {value}" for name, value in intervals.items())
            raise ValueError(f"{shown}; legal: at least 1")
        self.directory = Path(directory)
        self.total_steps = steps
        self.save_every = save_every
        self.log_samples_every = log_samples_every
        self._config = json.loads(json.dumps(config))
        self._source = source
        self._inputs = distributed.on_main("read what the run reads", lambda: file_digests(inputs))
        self._sources = run_sources(functions or {})  # now: their files may be edited while the run goes on
        self._progress_metrics = progress_metrics
        self._placement = placement
        self._logistics = logistics
        self._watchdog = watchdog or Watchdog()
        self._compile_watch = CompileWatch()
        self._seconds_of: dict[str, float] = {}  # of the timed functions in this step
        self._step_began = time.monotonic()
        self._start_step = 0
        self._saved_step: int | None = None
        self._signal: int | None = None
        self._log: Log | None = None
        self._tracker: Tracker | None = None
        self._refuse_other_settings()  # before the experiment does any work

    def __enter__(self) -> "Run":
        self._refuse_other_settings()
        distributed.on_main("open the run's directory", self._open_directory)
        if not distributed.is_main():
            self._wait_for_directory()
        self._checkpoints = Checkpoints(self.directory / "checkpoints", log_info=log_info)
        # With several processes JAX has a handler of its own (`distributed.reached_preemption`).
        signals = (signal.SIGTERM, signal.SIGINT) if distributed.process_count() == 1 else ()
        self._handlers = {s: signal.signal(s, self._on_signal) for s in signals}
        self._compile_watch.start()
        self._watchdog.start(linger_seconds=LINGER_SECONDS if distributed.is_main() else 0.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        failed_alone = distributed.process_count() > 1 and kind not in (None, SystemExit)
        with contextlib.ExitStack() as closing:  # the last one first, and all of them whatever one raises
            if distributed.is_main():
                closing.callback(self._lock.close)
                if self._log is not None:
                    closing.callback(lambda: log_info(f"report: {write_report(self.directory)}"))
                    if self._tracker is not None:
                        closing.callback(self._tracker.close)
                    closing.callback(self._log.close)
            closing.callback(self._compile_watch.stop)
            closing.callback(self._watchdog.stop)
            if not failed_alone:  # else the others may not come to finish what is still being saved
                closing.callback(self._checkpoints.close)

    def restore(self, state: TrainState) -> TrainState:
        """The newest undamaged checkpoint, in the shapes and shardings of `state`; else `state` itself."""
        restored = self._checkpoints.restore(state)
        if restored is not None:
            state = restored
            self._saved_step = int(restored.step)
            log_info(f"{self.directory}: resumed after step {self._saved_step} of {self.total_steps}")
        self._start_step = int(state.step)
        if distributed.is_main():
            self._record_functions()
            self._report_changed_settings()
            self._tracker = open_tracker(self.directory, self._config)
        self._log = Log(
            self.directory if distributed.is_main() else None,
            total_steps=self.total_steps,
            progress_metrics=self._progress_metrics,
            start=self._start_step,
            compiling=self._compile_watch.describe,
            writers=[self._tracker.write] if self._tracker else [],
        )
        self._compile_watch.take_seconds()  # what came before is no step's
        if self._is_told_to_end():  # while it was set up: compiling the first step may take longer than there is left
            self._stop(self._start_step)
        return state

    def steps(self, start: Array | int) -> Iterator[int]:
        """The steps from `start` on, each timed."""
        for step in range(int(start), self.total_steps):
            self._step_began = time.monotonic()
            self._seconds_of.clear()
            yield step

    def timed(self, **functions: Callable) -> tuple[Callable, ...]:
        """The functions, in order, each of which now waits for its result; NAME_seconds of a step are logged.

            draw, score, update = run.timed(sample=draw, score=score, update=update)

        Leave out what the next one need not wait for: waiting would take the overlap away.
        """
        return tuple(_Timed(function, name, self._seconds_of) for name, function in functions.items())

    def is_first_step(self, step: int) -> bool:
        """Whether this is the first step that this process computes."""
        return step == self._start_step

    def record(self, step: int, state: TrainState, metrics: dict[str, Any]) -> None:
        """Log a finished step and save a checkpoint when one is due.

        `state.step` must be step + 1, the step that a resumed run starts with. Raises FloatingPointError, saving
        nothing, where the loss, the gradient or the change of the parameters is not finite.
        """
        done = step + 1
        if int(state.step) != done:
            raise ValueError(f"record({step}, ...) wants state.step = {done}, not {int(state.step)}: replace it first")
        self._watchdog.step_ended()
        values = {name: float(value) for name, value in distributed.fetch(metrics).items()}
        self._refuse_non_finite(step, values)
        values["seconds"] = time.monotonic() - self._step_began
        values |= {f"{name}_seconds": seconds for name, seconds in self._seconds_of.items()}
        values["compile_seconds"] = self._compile_watch.take_seconds()
        values |= peak_bytes()
        if "tokens" in values:
            evaluating = self._seconds_of.get("eval", 0.0)
            values["tokens_per_second"] = values["tokens"] / (values["seconds"] - evaluating)
        self._log.write(step, values)
        is_told_to_end = self._is_told_to_end()
        if done % self.save_every == 0 or done == self.total_steps or is_told_to_end:
            self.save(state)
        if is_told_to_end:
            self._stop(done)
        if done == self.total_steps and distributed.process_count() > 1:
            self._checkpoints.wait()  # a process that fails alone in what comes now does not wait for it

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of the last step: what is measured after its checkpoint, so that no error loses it.

        A finished run that is run again measures again, perhaps with other functions: its log stays as it is.
        """
        self._log.add(self.total_steps - 1, metrics)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint now, unless this step is saved already."""
        if int(state.step) != self._saved_step:
            self._checkpoints.save(int(state.step), state)
            self._saved_step = int(state.step)

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """What is done inside does not count as the step's time."""
        began = time.monotonic()
        yield
        self._step_began += time.monotonic() - began

    def should_log_samples(self, step: int) -> bool:
        """Whether samples of this step are due."""
        return step % self.log_samples_every == 0 or step + 1 == self.total_steps

    def log_samples(
        self,
        step: int,
        batch: Batch,
        decode: Decode,
        names: Sequence[str],
        prompts: PromptBatch,
        token_columns: Mapping[str, Array] | None = None,
        turn_notes: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Log the completions of the first prompts of the batch, token by token, and write the report again.

        Call it before `record`, so that every checkpointed step has its samples. Its time does not count as the step's.

        Args:
          decode: token ids -> text. names: of the verifiers, as in `scores`.
          prompts: those of the batch, whose numbers are in `batch.traj.group`.
          token_columns: numbers [B T] shown with the tokens, by name: `log_ratio`, `entropy`.
          turn_notes: of each conversation of the batch, a text for each turn.
        """
        began = time.monotonic()
        with self.not_counted():
            rows, batch, token_columns = _fetch_shown(batch, token_columns)
            if not distributed.is_main():
                return
            turn_notes = turn_notes and [turn_notes[row] for row in rows]
            index = {int(number): i for i, number in enumerate(prompts.number)}
            columns = [prompts.columns[index[number]] for number in batch.traj.group.tolist()]
            records = sample_records(
                step, batch, decode, names=names, columns=columns, token_columns=token_columns, turn_notes=turn_notes
            )
            self._log.samples(records)
            write_report(self.directory)
        self._seconds_of["samples"] = time.monotonic() - began

    # ------------------------------------------------------------------------------------------------------ private

    def _open_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock_directory()
        self._write_config()

    def _lock_directory(self) -> None:
        self._lock = open(self.directory / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(f"{self.directory}: another process is running in this directory") from None

    def _wait_for_directory(self) -> None:
        """Until this process sees what process 0 made. Directories are listed: NFS remembers which files are absent."""
        deadline = time.monotonic() + SHARED_SECONDS
        while not (self.directory.is_dir() and "config.json" in os.listdir(self.directory)):
            if time.monotonic() > deadline:
                raise ValueError(f"{self.directory}: process 0 made it; legal: a directory that all processes see")
            time.sleep(1.0)

    def _refuse_other_settings(self) -> None:
        problem = distributed.on_main("look for other settings", self._other_settings)
        if problem:
            raise ValueError(problem)

    def _other_settings(self) -> str:
        """Why the directory is not of a run with these settings; "" where it is, or is of none."""
        path = self.directory / "config.json"
        if not path.is_file():
            return ""
        stored = json.loads(path.read_text()).get("config")
        if stored is None:
            return f"{self.directory} is no run directory: its config.json is not of a run; name another"
        before, now = flatten_settings(stored), flatten_settings(self._config)
        logistics = [name for name in self._logistics if "" not in (before.get(name), now.get(name))]
        changed = changed_settings(stored, self._config, ignored=[*self._placement, *logistics])
        if not changed:
            return self._changed_inputs()
        further = ""
        more_steps = stored.get("steps") != self._config.get("steps")
        if more_steps and "model" in self._config and (self.directory / "model").is_dir():
            further = f"; to train on from its weights: --model {self.directory}/model --directory NEW"
        return (
            f"{self.directory} holds a run with other settings: {changed}. "
            f"Resume it with its own settings, or name another with --directory{further}"
        )

    def _changed_inputs(self) -> str:
        path = self.directory / "inputs.json"
        if not path.is_file():  # it reads nothing, or an earlier version began it
            return ""
        return describe_changed_inputs(self.directory, json.loads(path.read_text()), self._inputs, "--directory")

    def _refuse_non_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name in MUST_BE_FINITE if not math.isfinite(values.get(name, 0.0))]
        if not bad:
            return
        if self._saved_step is None:
            last = "there is no checkpoint"
        else:
            last = f"the last checkpoint is step {self._saved_step}"
        raise FloatingPointError(f"{' and '.join(bad)} not finite at step {step}; {last}")

    def _write_config(self) -> None:
        path = self.directory / "config.json"
        if path.is_file():
            return
        facts = {
            "experiment": Path(self._source).stem if self._source else None,
            "git": git_revision(),
            **environment(),
        }
        if self._source:
            shutil.copyfile(self._source, self.directory / "experiment.py")
        if self._inputs:
            write_atomically(self.directory / "inputs.json", json.dumps(self._inputs, indent=1))
        write_atomically(path, json.dumps({"config": self._config, **facts}, indent=1))

    def _record_functions(self) -> None:
        folder = self.directory / "functions"
        changed = record_sources(folder, self._start_step, self._sources)
        if changed:
            if self._start_step >= self.total_steps:
                rest = "; no step is left to train with it, but evaluations use it: name another --directory to train"
            else:
                rest = ""
            log_info(
                f"warning: from step {self._start_step} on this run uses another source than before in "
                f"{', '.join(changed)}; both are kept in {folder}{rest}",
                style="yellow",
            )

    def _report_changed_settings(self) -> None:
        stored = json.loads((self.directory / "config.json").read_text())["config"]
        if changed := changed_settings(stored, self._config):
            log_info(f"from step {self._start_step} on: {changed}; what is learned does not depend on it")

    def _is_told_to_end(self) -> bool:
        if distributed.reached_preemption():
            self._signal = signal.SIGTERM
        return self._signal is not None

    def _stop(self, done: int) -> None:
        log_info(
            f"stopped by signal {self._signal} after step {done} of {self.total_steps}; "
            "run the same command again to resume"
        )
        raise SystemExit(128 + self._signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        log_info("finishing this step, then saving; press again to stop at once")
