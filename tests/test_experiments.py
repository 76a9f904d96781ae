"""Experiment scripts as a user runs them: a few tiny steps, killed and run again, and every kind of bad input."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import arithmetic_grpo
from experiments.common import command_line
from experiments.tools import check_parity
from rljax.train.log import MACHINE_METRICS, console, log_info

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "experiments"
LAST = re.compile(r"eval accuracy: [01]\.\d{3} -> [01]\.\d{3}")
# One device, as a laptop has; the tests themselves run on eight virtual ones.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)  # this checkout, whichever one is installed
STEPS = 35
TINY = {
    "algorithm": "ppo",
    "reward": "random",
    "steps": STEPS,
    "sft_target": 0.0,
    "eval_prompts": 16,
    "save_every": 7,
    "eval_every": 5,
    "batches.prompts": 4,
    "batches.num_generations": 2,
    "batches.oversample": 1,
    "batches.micro_batches": 1,
}


def flags(fields: dict) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def command(directory: Path) -> list[str]:
    script = str(SCRIPTS / "arithmetic_grpo.py")
    return [sys.executable, "-W", "error", script, *flags({**TINY, "directory": directory})]


def run(words: list) -> list[str]:
    """Lines printed by a command that succeeds."""
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def metrics(directory: Path) -> list[dict]:
    """All but the clock's."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(MACHINE_METRICS)} for line in lines]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(a run that was never stopped, its last line)"""
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, run(command(directory))[-1]


# ------------------------------------------------------------------------------------------------------ what is left


def test_a_run_leaves_what_one_looks_at(finished):
    directory, last = finished
    assert LAST.fullmatch(last)
    records = metrics(directory)
    assert [record["step"] for record in records] == list(range(STEPS))
    assert {"reward", "reward/exact", "length", "entropy", "loss", "grad_norm"} <= set(records[0])
    assert [record["step"] for record in records if "eval_reward" in record] == list(range(4, STEPS, 5))
    assert max(record["grad_norm"] for record in records) > 0
    config = json.loads((directory / "config.json").read_text())
    assert config["experiment"] == "arithmetic_grpo"
    assert config["config"]["batches"]["prompts"] == 4
    assert (directory / "experiment.py").read_text() == (SCRIPTS / "arithmetic_grpo.py").read_text()
    assert "</html>" in (directory / "report.html").read_text()
    assert list((directory / "tensorboard").iterdir())


def test_killed_and_run_again_it_ends_the_same(finished, tmp_path):
    """kill -9 between two checkpoints; metrics and samples are equal to the last bit."""
    uninterrupted, last = finished
    directory = tmp_path / "run"
    words = command(directory)
    killed = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = directory / "metrics.jsonl"
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= STEPS // 4):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert STEPS // 4 <= log.read_bytes().count(b"\n") < STEPS

    lines = run(words)
    assert any("resumed after step" in line for line in lines)
    assert lines[-1] == last
    assert metrics(directory) == metrics(uninterrupted)
    assert (directory / "samples.jsonl").read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()


# What the run above leaves out, in one process, which starts once.
PROGRAM = """
import dataclasses, sys
root, *names = sys.argv[1:]
from experiments import arithmetic_grpo as experiment, arithmetic_sft
from experiments.common.command_line import configure_jax
from experiments.common.settings import Batches

configure_jax()
one_update = Batches(prompts=4, num_generations=2)
four_updates = dataclasses.replace(one_update, epochs=2, minibatches=2)
runs = {
    "remax": dict(task="sortings", reward="shuffled", batches=one_update),
    "gdpo": dict(batches=four_updates),
    "trpo": dict(batches=one_update),
}
tiny = experiment.Config(sft_target=0.0, steps=2, eval_prompts=16)
for name in names:
    experiment.main(dataclasses.replace(tiny, algorithm=name, directory=f"{root}/{name}", **runs[name]))
arithmetic_sft.main(arithmetic_sft.Config(steps=2, batch_size=8, eval_prompts=16, target=1.0, directory=f"{root}/sft"))
"""


@pytest.mark.nightly
def test_algorithms_with_needs_of_their_own_and_every_reward_and_task(tmp_path):
    names = ("remax", "gdpo", "trpo")
    lines = run([sys.executable, "-W", "error", "-c", PROGRAM, tmp_path, *names])
    assert len([line for line in lines if LAST.fullmatch(line)]) == len(names)
    assert "after 2 steps of supervised learning" in lines[-2]
    assert re.fullmatch(r"eval accuracy: [01]\.\d{3}", lines[-1])
    for name in names:
        assert [record["step"] for record in metrics(tmp_path / name)] == [0, 1]


def test_a_finished_run_again_says_the_same_and_changes_nothing(finished):
    directory, last = finished
    kept = ("metrics.jsonl", "samples.jsonl", "config.json", "experiment.py")
    before = {name: (directory / name).read_bytes() for name in kept}
    assert run(command(directory))[-1] == last
    assert {name: (directory / name).read_bytes() for name in kept} == before


# --------------------------------------------------------------------------------------------------------- bad input


def complain(monkeypatch, capsys, module, fields: dict) -> tuple[int, str]:
    """Exit code and all that was printed."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *flags(fields)])
    with pytest.raises(SystemExit) as stop:
        command_line.run(module.Config, module.main)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return stop.value.code, out + err


LEGAL = r"legal: --seed [\s\S]*--steps[\s\S]*--batches\.prompts[\s\S]*"


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"stps": 3}, 2, LEGAL + r"--stps"),
        ({"batches.groups": 3}, 2, LEGAL + r"--batches\.groups"),
        ({"steps": "many"}, 2, r"--steps[\s\S]*many[\s\S]*--steps INT"),
        ({"algorithm": "gpro"}, 2, r"gpro[\s\S]*grpo"),
        ({"debug": "perhaps"}, 2, LEGAL + r"perhaps"),
        (
            {"batches.prompts": 3, "batches.num_generations": 2},
            1,
            r"error: .*prompts x num_generations = 3 x 2 completions over 8 devices .*nearest legal prompts: \[4\];",
        ),
        ({"batches.num_generations": 0}, 1, r"error: .*num_generations = 0; at least 1\n$"),
        (
            {"batches.num_generations": 6, "batches.minibatches": 5},
            1,
            r"error: .*8 x 6 = 48 .* 5 x 1 .*legal products: \[.*\]\n$",
        ),
        (
            {"algorithm": "trpo", "batches.epochs": 2},
            1,
            r"error: trpo .*epochs x minibatches = 2 x 1; legal: 1 x 1\n$",
        ),
        ({"algorithm": "ppo", "batches.oversample": 2}, 1, r"error: ppo learns from every completion: .*; legal: 1\n$"),
        ({"batches.carry_over": 8}, 1, r"error: .*carry_over = 8, but this experiment continues .*; legal: 0\n$"),
        ({"mesh.data": 3}, 1, r"error: mesh .* 3 x .* does not cover 8 devices; .* one of \[1, 2, 4, 8\]"),
        ({"seed": 1}, 1, r"error: .* holds a run with other settings: .*seed = 0, now 1.* --directory\n$"),
        ({"steps": 36}, 1, r"error: .* holds a run with other settings: .*steps = 35, now 36.* --directory\n$"),
    ],
    ids=lambda value: " ".join(flags(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_harm_no_run(fields, code, message, finished, monkeypatch, capsys):
    """Here there are eight devices; the run was made on one."""
    directory, _ = finished
    before = contents(directory)
    legal = {**TINY, "batches.prompts": 8, "directory": directory}
    got, printed = complain(monkeypatch, capsys, arithmetic_grpo, legal | fields)
    assert (got, bool(re.search(message, printed))) == (code, True), printed
    assert contents(directory) == before


@dataclasses.dataclass(frozen=True)
class Word:
    """A word to say."""

    word: str = "hello"


def say_and_fail(cfg: Word) -> None:
    log_info(cfg.word)
    raise ValueError("that was all")


@pytest.mark.parametrize(
    ("words", "printed"), [([], "hello\nerror: that was all\n"), (["--quiet"], "error: that was all\n")]
)
def test_quiet_prints_nothing_but_errors(words, printed, monkeypatch, capsys):
    monkeypatch.setattr(console, "quiet", False)
    monkeypatch.setattr(sys, "argv", ["say.py", *words])
    with pytest.raises(SystemExit):
        command_line.run(Word, say_and_fail)
    assert capsys.readouterr().out == printed


def test_parity_needs_a_model(monkeypatch, capsys, tmp_path):
    code, printed = complain(monkeypatch, capsys, check_parity, {"model": tmp_path})
    assert code == 1
    assert re.fullmatch(r"error: no model in .*: config\.json is missing .*\n", printed)


MODULES = sorted(path for path in SCRIPTS.glob("**/*.py") if "peers" not in path.relative_to(SCRIPTS).parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_every_file_is_a_module_of_the_package(path):
    """So nothing hangs on the folder that a script is started in, and no name of a file hides another module's."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert importlib.import_module(name).__file__ == str(path)


RESUMED = sorted(path for path in SCRIPTS.glob("*.py") if "run.restore(" in path.read_text())


@pytest.mark.parametrize("path", RESUMED, ids=lambda path: path.stem)
def test_every_script_gives_the_state_up_that_it_began_with(path):
    """tests/test_grpo_experiment.py counts the arrays of one of them."""
    text = path.read_text()
    assert text.count("place(state, shardings.state, donate=True)") == text.count("run.restore(") == 1
    assert ("before = " in text) == ("before = train.before_training(run, evaluate, state)" in text)


WITH_WEIGHTS = [path for path in RESUMED if "weights: Weights" in path.read_text()]


@pytest.mark.parametrize("path", WITH_WEIGHTS, ids=lambda path: path.stem)
def test_every_script_that_samples_refuses_batch_invariance_where_it_does_not_hold(path):
    """By the check itself, or by its first step, whose log-probs must be the sampler's."""
    text = path.read_text()
    assert ("sampling: Sampling" in text) == ("check_batch_invariance(" in text or "require_on_policy(" in text)


RECIPES = sorted(path for path in [*SCRIPTS.glob("*.py"), *SCRIPTS.glob("tools/*.py")] if path.stem != "__init__")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_scripts_say_what_they_reached(path):
    assert "Reached" in path.read_text().split('"""')[1]
