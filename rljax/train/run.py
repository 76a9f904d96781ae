"""A run directory: lock, settings, log, checkpoints, signals. The one resource object of an experiment; no mathematics.

    config.json     the settings, the experiment, the git revision
    experiment.py   the experiment's own source
    metrics.jsonl, tensorboard/, samples.jsonl, report.html
    checkpoints/

Running the same command again resumes from the newest good checkpoint; what was logged after it is dropped and done
again, and the result is bit-identical to a run that was never stopped.
"""

import fcntl
import json
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from rljax.train.checkpoint import Checkpoints
from rljax.train.log import HEADLINES, Log, log_info, write_atomically
from rljax.train.report import write_report
from rljax.train.samples import sample_records
from rljax.types import Batch, Rows, TrainState


class Run:
    """One training run in one directory.

        with Run(directory, config, steps=cfg.steps, source=__file__) as run:
            state = run.restore(state)
            for step in run.steps(state.step):
                ...
                run.record(step, state, metrics)

    Args:
      config: settings, as JSON. A directory that holds a run with other settings is refused, untouched.
      steps: turns of the loop. save_every: steps between checkpoints (the last step is always saved).
      log_samples_every: steps between samples of what the policy wrote. headlines: metrics on the progress line.
    """

    def __init__(
        self,
        directory: str | Path,
        config: dict,
        *,
        steps: int,
        source: str | None = None,
        save_every: int = 50,
        log_samples_every: int = 20,
        headlines: Sequence[str] = HEADLINES,
    ):
        if steps < 1 or save_every < 1 or log_samples_every < 1:
            raise ValueError(
                f"steps {steps}, save_every {save_every}, log_samples_every {log_samples_every}; legal: at least 1"
            )
        self.directory = Path(directory)
        self.total, self.save_every, self.log_samples_every = steps, save_every, log_samples_every
        self._config, self._source, self._headlines = json.loads(json.dumps(config)), source, headlines
        self._start, self._saved, self._stop = 0, None, None
        self._log = self._checkpoints = None
        self._refuse_other_settings()  # before the experiment does any work

    def __enter__(self) -> "Run":
        self._refuse_other_settings()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.directory / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(f"{self.directory}: another process is running in this directory") from None
        self._describe()
        self._checkpoints = Checkpoints(self.directory / "checkpoints", log_info=log_info)
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._checkpoints.close()
        if self._log is not None:
            self._log.close()
            log_info(f"report: {write_report(self.directory)}")
        self._lock.close()

    def restore(self, state: TrainState) -> TrainState:
        """The newest good checkpoint, in the shapes and shardings of `state`; else `state` itself."""
        found = self._checkpoints.restore(state)
        if found is not None:
            state, self._saved = found, int(found.step)
            log_info(f"{self.directory}: resumed after step {self._saved} of {self.total}")
        self._start = int(state.step)
        self._log = Log(self.directory, total_steps=self.total, names=self._headlines, start=self._start)
        return state

    def steps(self, start) -> Iterator[int]:
        """The steps still to do, each timed."""
        for step in range(int(start), self.total):
            self._began = time.monotonic()
            yield step

    def first(self, step: int) -> bool:
        """Whether this is the first step that this process makes."""
        return step == self._start

    def record(self, step: int, state: TrainState, metrics: dict) -> None:
        """Log a finished step and checkpoint when due. `state.step` must be step + 1: what a resumed run goes on with.

        Raises FloatingPointError, saving nothing, where the loss or the gradient is not finite.
        """
        if int(state.step) != step + 1:
            raise ValueError(
                f"record({step}, ...) wants state.step = {step + 1}, not {int(state.step)}: replace it first"
            )
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values.get(name, 0.0))]
        if bad:
            last = "there is no checkpoint" if self._saved is None else f"the last checkpoint is step {self._saved}"
            raise FloatingPointError(f"{' and '.join(bad)} not finite at step {step}; {last}")
        values["seconds"] = time.monotonic() - self._began
        if "tokens" in values:
            values["tokens_per_second"] = values["tokens"] / values["seconds"]
        self._log.write(step, values)
        done = step + 1
        if done % self.save_every == 0 or done == self.total or self._stop is not None:
            self.save(state)
        if self._stop is not None:
            log_info(
                f"stopped by signal {self._stop} after step {done} of {self.total}; run the same command again to go on"
            )
            raise SystemExit(128 + self._stop)

    def save(self, state: TrainState) -> None:
        """Checkpoint now, unless this step is saved already."""
        if int(state.step) != self._saved:
            self._checkpoints.save(int(state.step), state)
            self._saved = int(state.step)

    def shows(self, step: int) -> bool:
        """Whether samples of this step are due."""
        return step % self.log_samples_every == 0 or step + 1 == self.total

    def show(self, step: int, batch: Batch, decode: Callable, names: Sequence[str], rows: Rows, log_ratio=None) -> None:
        """Keep what the policy wrote to the first prompts of the batch, token by token, and renew the report.

        To be called before `record`, so that no checkpoint comes without its samples; its time is not the step's.
        rows: the prompts, told by their number, which is `batch.traj.group`.
        """
        began = time.monotonic()
        place = {int(number): i for i, number in enumerate(rows.number)}
        columns = [rows.columns[place[number]] for number in np.asarray(batch.traj.group).tolist()]
        records = sample_records(step, batch, decode, names=names, columns=columns, log_ratio=log_ratio)
        self._log.samples(records)
        write_report(self.directory)
        self._began += time.monotonic() - began

    # ------------------------------------------------------------------------------------------------------ inside

    def _refuse_other_settings(self) -> None:
        path = self.directory / "config.json"
        if not path.is_file():
            return
        before = json.loads(path.read_text()).get("config")
        if before is None:
            raise ValueError(f"{self.directory} is no run directory: its config.json is not of a run; name another")
        before, now = _flat(before), _flat(self._config)
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        other = [f"{name} = {before.get(name)!r}, now {now.get(name)!r}" for name in names]
        if other:
            raise ValueError(
                f"{self.directory} holds a run with other settings: {'; '.join(other)}. "
                "Resume it with its own settings, or name another with --directory"
            )

    def _describe(self) -> None:
        path = self.directory / "config.json"
        if path.is_file():
            return
        name = Path(self._source).stem if self._source else None
        about = {"experiment": name, "git": _revision(), "jax": jax.__version__, "devices": jax.device_count()}
        if self._source:
            shutil.copyfile(self._source, self.directory / "experiment.py")
        write_atomically(path, json.dumps({"config": self._config, **about}, indent=1))

    def _on_signal(self, number: int, frame) -> None:
        if self._stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = number
        log_info("finishing this step, then saving; once more to stop at once")


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted names, as on the command line."""
    out = {}
    for name, value in settings.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _revision() -> str | None:
    """The git revision of this code, with + if it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
