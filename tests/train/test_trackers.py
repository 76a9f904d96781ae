"""Runs that log to wandb and trackio too: the packages' own files hold the metrics, and a resumed run keeps its id.

Without the packages (`pip install 'rljax[trackers]'`) only what is refused is tested.
"""

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rljax.train import trackers
from rljax.train.run import Run
from rljax.types import TrainState

ROOT = Path(__file__).resolve().parents[2]
METRICS = [{"loss": 0.5, "reward": 0.25}, {"loss": 0.25, "reward": 0.5}, {"loss": 0.125, "reward": 0.75}]


def train(directory, steps):
    """A run of three steps that stops, as if it were preempted, after `steps` of them."""
    state = TrainState(0, {"w": jnp.zeros(2)}, (), jax.random.key(0))
    with Run(directory, {"lr": 0.1}, steps=3, save_every=1) as run:
        state = run.restore(state)
        for step in run.steps(state.step):
            if step == steps:
                break
            state = state.replace(step=step + 1)
            run.record(step, state, METRICS[step])


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` that notes what it is told."""
    told = types.SimpleNamespace(inits=[], logged=[], finished=0)

    def finish():
        told.finished += 1

    def init(**kwargs):
        told.inits.append(kwargs)
        return types.SimpleNamespace(log=lambda values, step: told.logged.append((step, values)), finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs))
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    return told


def test_every_step_is_logged_and_a_resumed_run_keeps_its_id(fake_wandb, tmp_path):
    train(tmp_path / "run", 2)
    train(tmp_path / "run", 3)
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] == json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert second["resume"] == "allow"
    assert second["config"] == {"lr": 0.1}
    logged = {step: {name: values[name] for name in METRICS[step]} for step, values in fake_wandb.logged}
    assert logged == dict(enumerate(METRICS))
    assert fake_wandb.finished == 2


def test_another_run_has_another_id(fake_wandb, tmp_path):
    train(tmp_path / "a", 1)
    train(tmp_path / "b", 1)
    assert fake_wandb.inits[0]["id"] != fake_wandb.inits[1]["id"]


def test_without_a_tracker_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv(trackers.VARIABLE, "none")
    train(tmp_path / "run", 1)
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_what_is_refused_says_what_is_legal(tmp_path, monkeypatch):
    monkeypatch.setenv(trackers.VARIABLE, "mlflow")
    with pytest.raises(ValueError, match="legal: none, wandb, trackio"):
        train(tmp_path / "run", 1)
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"pip install 'rljax\[trackers\]'"):
        train(tmp_path / "run", 1)
    no_login = types.SimpleNamespace(init=lambda **_: 1 / 0, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", no_login)
    with pytest.raises(RuntimeError, match="legal without it: --tracker none"):
        train(tmp_path / "run", 1)


# ------------------------------------------------------------------------------------------------- the real packages

# In a process of its own: both leave threads, wandb a service too.
PROCESS = """
import sys
from pathlib import Path
from tests.train.test_trackers import train
train(Path(sys.argv[1]), 2)
train(Path(sys.argv[1]), 3)
"""


def train_and_resume(directory, name, **environ):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is absent: pip install 'rljax[trackers]'")
    environ = os.environ | {"PYTHONPATH": str(ROOT), trackers.VARIABLE: name} | environ
    done = subprocess.run([sys.executable, "-c", PROCESS, directory], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "trackers.json").read_text())[name]


def test_trackio_has_one_run_with_every_step(tmp_path):
    run_id = train_and_resume(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "rljax.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in rows} == {f"run-{run_id}"}
    assert [step for _, step, _ in rows] == [0, 1, 2]
    for want, (*_, logged) in zip(METRICS, rows, strict=True):
        assert want.items() <= json.loads(logged).items()


def test_wandb_offline_has_every_step_under_one_id(tmp_path):
    run_id = train_and_resume(tmp_path / "run", "wandb", WANDB_MODE="offline")
    from wandb.proto.wandb_internal_pb2 import Record

    logged, ids = {}, []
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(Record.FromString, records_of(file.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                names = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                logged[record.history.step.num] = {name: json.loads(names[name]) for name in METRICS[0]}
    assert set(ids) == {run_id}
    assert len(ids) >= 2
    assert logged == dict(enumerate(METRICS))


def records_of(data):
    """The records of wandb's file: LevelDB's log format after a head of 7 bytes, in blocks of 32 KiB."""
    position, parts = 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []
