"""What the command line of every script sets for the whole process."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest

from experiments.common import command_line
from rljax.train import trackers

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SCRIPTS = [path for path in sorted(EXPERIMENTS.glob("**/*.py")) if "command_line.run(" in path.read_text()]


@dataclasses.dataclass(frozen=True)
class Config:
    """A script of one setting."""

    steps: int = 1  # steps


@pytest.fixture
def run(monkeypatch):
    """run(words, **how): the script with this command line; what it was called with, and the tracker it saw."""
    monkeypatch.setattr(command_line, "configure_jax", lambda debug: None)

    def start(words, **how):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        seen = []
        command_line.run(Config, lambda config: seen.append((config, os.environ[trackers.VARIABLE])), **how)
        return seen

    return start


def test_the_tracker_is_that_of_the_flag_else_of_the_environment(run, monkeypatch):
    monkeypatch.setenv(trackers.VARIABLE, "")
    assert run(["--steps", "3"]) == [(Config(3), "none")]
    assert run(["--tracker", "trackio"]) == [(Config(), "trackio")]
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    assert run([]) == [(Config(), "wandb")]
    assert run(["--tracker", "none"]) == [(Config(), "none")]


def test_a_script_without_a_run_has_no_tracker(run, monkeypatch, capsys):
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    assert run(["--steps", "3"], makes_run=False) == [(Config(3), "wandb")]
    with pytest.raises(SystemExit) as stop:
        run(["--tracker", "wandb"], makes_run=False)
    assert stop.value.code == 2
    legal, error, _ = capsys.readouterr().err.partition("Unrecognized")
    assert error
    assert "--steps" in legal
    assert "--tracker" not in legal


def test_another_tracker_is_refused_with_the_legal_ones(run, monkeypatch, capsys):
    monkeypatch.setenv(trackers.VARIABLE, "")
    with pytest.raises(SystemExit) as stop:
        run(["--tracker", "mlflow"])
    assert stop.value.code == 2
    assert "trackio" in capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_say_whether_they_make_a_run(path):
    text = path.read_text(encoding="utf-8")
    makes_one = re.search(r"\bRun\(|make_run\w*\(|\w\.main\(|\brlhf\.\w+\(", text) is not None
    assert makes_one == ("makes_run=False" not in text)
