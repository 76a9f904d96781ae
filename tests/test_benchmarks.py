"""Benchmarks without their clocks: arguments, what they run, on a tiny model, and how they run peers."""

import ast
import dataclasses
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
import tyro

from experiments.benchmarks import against, common, conversations, cost, grpo_step, packing, rollout, shares, train_step
from experiments.benchmarks.common import Workload
from experiments.benchmarks.roofline import Rates
from rljax.models import policy
from rljax.models.decoder import DecoderConfig
from rljax.types import Batch, trajectory_of_tokens

PEERS = Path(against.__file__).with_name("peers")
TINY = Workload(DecoderConfig(64, 16, 1, 2, 1, 8, 24), prompts=8, n=2, prompt_tokens=5, completion_tokens=6)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(common.WORKLOADS, "W1", TINY)


@pytest.mark.parametrize("benchmark", [rollout, train_step, grpo_step], ids=lambda module: module.__name__)
def test_peers_are_named_on_the_command_line(benchmark):
    assert tyro.cli(benchmark.Config, args=["--against", "tunix", "trl"]).against == ("tunix", "trl")


def test_the_last_run_of_a_turn_is_timed_and_the_first_round_is_left_out(monkeypatch):
    """A clock that goes on by one in each run of the first work, and by 100 in each of the second."""
    clock, runs = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def run(i):
            runs.append((name, i))
            clock[0] += seconds if runs.count((name, i)) == 2 else 10 * seconds

        return run

    times = common.alternately({"a": work("a", 1.0), "b": work("b", 100.0)}, repeats=2, untimed=1)
    assert times == {"a": [1.0, 1.0], "b": [100.0, 100.0]}
    assert runs == [(name, i) for i in range(3) for name in "aabb"]
    parts = {"4 pieces": {"rollout": [50.0, 9.0, 7.0, 1.0, 8.0, 3.0]}}
    assert list(grpo_step.report_parts("W1", parts, untimed=1).values()) == [2.0]
    assert list(grpo_step.report_parts("W1", parts, untimed=0).values()) == [7.0]


@pytest.mark.nightly
def test_a_step_of_every_algorithm(tiny, tmp_path):
    cfg = train_step.Config(micro_batches=(2,), repeats=1, json=str(tmp_path / "figures.json"))
    figures = train_step.main(cfg)
    expected = {f"W1, {name}, {m} micro-batches, seconds" for name in cfg.algorithms for m in cfg.micro_batches}
    assert figures.keys() == expected
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


def test_a_whole_step_learns(tiny):
    figures = grpo_step.main(grpo_step.Config(repeats=1))
    parts = ("rollout", "rewards", "advantages, update, metrics")
    assert figures.keys() == {
        "W1, GRPO step, 1 micro-batches, seconds",
        *(f"W1, GRPO step, 1 micro-batches, {part}, seconds" for part in parts),
    }


def test_figures_name_the_number_of_micro_batches_that_sizes_give(tiny, monkeypatch):
    monkeypatch.setattr(train_step, "own_step", lambda name, workload, micro_batches: lambda i: None)
    figures = train_step.main(train_step.Config(repeats=1))
    assert figures.keys() == {f"W1, {name}, 1 micro-batches, seconds" for name in ("grpo", "ppo", "dpo", "sft")}

    rates = Rates(defaultdict(lambda: float("inf")), defaultdict(lambda: float("inf")))
    monkeypatch.setattr(shares, "measure", lambda *args, **kwargs: rates)
    monkeypatch.setattr(shares, "own_step", lambda name, workload, micro_batches: lambda i: None)
    monkeypatch.setattr(shares, "sample", lambda *args: None)
    figures = shares.main(shares.Config(repeats=1))
    assert {name for name in figures if "median" in name} == {
        "W1, rollout, median, s",
        "W1, update, 1 micro-batches, median, s",
    }


def test_products_are_those_of_recipes(monkeypatch):
    monkeypatch.setattr("sys.argv", ["returns.py", "--rows", "3"])
    found = {}

    def main(cfg):
        found[cfg.rows] = jax.config.jax_default_matmul_precision

    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    try:
        common.run(dataclasses.make_dataclass("Config", [("rows", int, 1)]), main)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert found == {3: "float32"}


def test_the_rollout_on_one_device_is_that_of_a_machine_with_one(monkeypatch):
    """Its projections are fused, though there are eight devices here."""
    monkeypatch.setattr(rollout, "sampler", lambda lm, *_: lm)
    config = dataclasses.replace(TINY.config, head_dim=16)  # batch-invariant mode takes no smaller one
    params = policy.init(config, jax.random.key(0))
    lms = rollout.own_works(rollout.Config(devices=8), TINY, config, params)
    fused = {}
    for name in ("rollout", "batch-invariant", "a queue, slots", "on 8 devices"):
        prepared, _ = lms[name].prepare(params, {})
        fused[name] = "fused" in prepared["layers"][0]["attention"]
    assert fused == {"rollout": True, "batch-invariant": False, "a queue, slots": True, "on 8 devices": False}


def test_a_shared_prompt_is_counted_once(monkeypatch):
    """Two prompts of 2 columns, each with two completions of 3, 1 and 2, 3 columns of 3."""
    monkeypatch.setattr(packing, "PROMPT_COLUMNS", 2)
    monkeypatch.setattr(packing, "COMPLETIONS", 2)
    inside = np.arange(6) < 1 + 2 + np.array([[3], [1], [2], [3]])
    traj = trajectory_of_tokens(0 * inside, inside.astype(int), inside, 0.0 * inside)
    batch = Batch(traj=traj, advantages=traj.logp, mask=traj.mask)
    assert packing.padding_of(batch, {}) == 1 - (4 * 2 + 9) / (4 * 5)
    assert packing.padding_of(batch, {"shared_prefix": 1.0}) == 1 - (2 * 2 + 9) / (2 * 2 + 4 * 3)
    assert packing.padding_of(batch, {"padding_after": 0.25, "shared_prefix": 1.0}) == 0.25


@pytest.mark.nightly
def test_costs_are_of_the_update_that_recipes_make():
    _, metrics = cost.works_of(TINY)["update"](0)
    assert metrics["shared_prefix"] == 1


def test_virtual_devices_are_measured_on_a_cpu_alone(monkeypatch):
    ran = []

    def run(command, env, **_):
        ran.append((command[-3], env["JAX_PLATFORMS"]))
        return SimpleNamespace(stdout='an update is cut\n{"rollout": 1.0, "update": 2.0}\n')

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(subprocess, "run", run)
    for devices in (1, 2):
        assert cost.seconds_at(cost.DEVICES, devices, cost.Config()) == {"rollout": 1.0, "update": 2.0}
    assert ran == [("1", "cpu"), ("2", "cpu")]


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


@pytest.mark.parametrize(("dtype", "backend"), [("bfloat16", "cpu"), ("float32", "gpu")])
def test_peers_run_beside_float32_on_a_cpu_alone(monkeypatch, dtype, backend):
    """Refused before an environment is made."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    message = f"peers run in float32 on CPUs, and this benchmark would run in {dtype} on a {backend}"
    for what in ({"against": ("tunix", "trl")}, {"transformers": True}):
        with pytest.raises(ValueError, match=message):
            rollout.workload_of(rollout.Config(dtype=dtype, **what))
    config = dataclasses.replace(TINY.config, dtype=dtype)
    with pytest.raises(ValueError, match=message), against.peer_works(("trl",), "sft", TINY._replace(config=config)):
        pass
    with against.peer_works((), "sft", TINY._replace(config=config)) as peers:
        assert peers == {}
    assert rollout.workload_of(rollout.Config(dtype=dtype)).config.dtype == dtype


def test_virtual_devices_are_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="devices = 2 are virtual ones of a CPU; legal on a gpu: 1"):
        rollout.workload_of(rollout.Config(devices=2))


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
