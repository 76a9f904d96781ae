"""Benchmarks without their clocks: arguments, what they run, on a tiny model, and how they run peers."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import tyro

from experiments.benchmarks import against, common, conversations, grpo_step, rollout, train_step
from experiments.benchmarks.common import Workload
from rljax.models.decoder import DecoderConfig

PEERS = Path(against.__file__).with_name("peers")
TINY = Workload(DecoderConfig(64, 16, 1, 2, 1, 8, 24), prompts=8, n=2, prompt_tokens=5, completion_tokens=6)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(common.WORKLOADS, "W1", TINY)


@pytest.mark.parametrize("benchmark", [rollout, train_step, grpo_step], ids=lambda module: module.__name__)
def test_peers_are_named_on_the_command_line(benchmark):
    assert tyro.cli(benchmark.Config, args=["--against", "tunix", "trl"]).against == ("tunix", "trl")


@pytest.mark.nightly
def test_a_step_of_every_algorithm(tiny, tmp_path):
    cfg = train_step.Config(micro_batches=(2,), repeats=1, json=str(tmp_path / "figures.json"))
    figures = train_step.main(cfg)
    expected = {f"W1, {name}, {m} micro-batches, seconds" for name in cfg.algorithms for m in cfg.micro_batches}
    assert figures.keys() == expected
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


def test_a_whole_step_learns(tiny):
    figures = grpo_step.main(grpo_step.Config(micro_batches=(2,), repeats=1))
    parts = ("rollout", "rewards", "advantages, update, metrics")
    assert figures.keys() == {
        "W1, GRPO step, 2 micro-batches, seconds",
        *(f"W1, GRPO step, 2 micro-batches, {part}, seconds" for part in parts),
    }


def test_conversations_are_sampled_with_a_kept_cache_and_without(tiny):
    cfg = conversations.Config(turns=(2,), turn_tokens=4, observation_tokens=3, repeats=1)
    figures = conversations.main(cfg)
    ratio = figures.pop("2 turns, re-prefill / kept")
    assert figures.keys() == {"2 turns, kept, seconds", "2 turns, prefill, seconds"}
    assert ratio == figures["2 turns, prefill, seconds"] / figures["2 turns, kept, seconds"]


def test_a_ratio_above_one_says_that_the_peer_takes_longer():
    figures = train_step.report("W1, sft", {"8 micro-batches": [1.0, 2.0, 9.0], "TRL": [8.0, 6.0, 5.0]})
    assert figures["W1, sft, TRL / 8 micro-batches"] == 3.0


# ---------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("name", against.PEERS)
def test_every_peer_does_every_unit(name):
    """The workers import what only their own environments have, so their source is read."""
    body = ast.parse((PEERS / f"{name}_worker.py").read_text()).body
    (units,) = (node.value for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "UNITS")
    assert tuple(key.value for key in units.keys) == get_args(against.Unit)


def script(folder: Path, source: str) -> Path:
    path = folder / "worker.py"
    path.write_text(source)
    return path


def test_a_worker_works_when_asked_and_tells_when_it_ends(tmp_path):
    once = script(tmp_path, "import json, sys; input(); print(json.loads(sys.argv[1])['n'], flush=True); input()")
    with against.worker(Path(sys.executable), once, "rollout", {"n": 3}) as work:
        work(0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"worker\.py ended in rollout"):
                work(1)


def test_a_worker_that_prints_something_else_is_noticed(tmp_path):
    warning = script(tmp_path, "input(); print('a warning', flush=True)")
    with against.worker(Path(sys.executable), warning, "sft", {}) as work, pytest.raises(ValueError, match="a warning"):
        work(0)


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / "trl").mkdir(exist_ok=True)

    monkeypatch.setattr(against, "FOLDER", tmp_path)
    monkeypatch.setattr(against, "interpreter", lambda version: f"python{version}")
    monkeypatch.setattr(subprocess, "run", run)
    assert against.environment("trl") == tmp_path / "trl" / "bin" / "python"
    assert commands[0] == ["python3.11", "-m", "venv", "--clear", str(tmp_path / "trl")]
    assert commands[-1][-3:] == list(against.PEERS["trl"].packages)
    made = len(commands)
    against.environment("trl")
    assert len(commands) == made


def test_an_interrupted_install_is_taken_up_again(monkeypatch, tmp_path):
    def run(command, check):
        (tmp_path / "tunix").mkdir(exist_ok=True)
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(against, "FOLDER", tmp_path)
    monkeypatch.setattr(against, "interpreter", lambda version: f"python{version}")
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            against.environment("tunix")


def test_a_python_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"needs Python 2\.3, and `python2\.3` does not run here"):
        against.interpreter("2.3")
