"""Several processes: grpo.py on 2 and 4 of them is the run of one; what becomes of the others when one fails.

Processes on this machine, each with its own virtual CPU devices (launch.py). The long ones are of `make nightly`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distributed import launch
from models import tiny
from rljax.train.run import Run
from rljax.train.watchdog import EXIT_CODE
from rljax.types import TrainState
from rollouts.common import CLOSE
from test_grpo_experiment import RAW, ROWS, write_prompts, write_tokenizer

SCRIPT = "tests/distributed/train.py"
HEARTBEAT = ("--hosts.heartbeat_seconds", "10")  # JAX's own 100 seconds are for busy machines
STEPS = 6


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Six steps of five prompts with eight completions: 40 rows divide over 8 devices, prompts over no processes."""
    root = tmp_path_factory.mktemp("processes")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    prompts = write_prompts(root / "prompts.jsonl", [*ROWS, *({**row, "prompt": row["prompt"] + "s"} for row in ROWS)])
    text = f"--model {root / 'model'} --prompts {prompts} --rewards share --steps {STEPS} --save_every 2 --seed 1 "
    text += "--batches.prompts 5 --batches.num_generations 8 --sampling.max_tokens 8 --eval_prompts 2 --eval_samples 8 "
    return [*text.split(), "--optimizer.learning_rate", "1e-3", "--optimizer.warmup_steps", "2", *HEARTBEAT]


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    """The directory of the run of one process with 8 devices."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    (ended,) = launch.run(SCRIPT, *flags, "--directory", str(directory), processes=1, devices=8)
    assert ended.code == 0, ended.output
    rewards = [line["reward"] for line in launch.metrics(directory)]
    assert len(rewards) == STEPS
    assert len(set(rewards)) == STEPS
    return directory


def assert_same_run(directory: Path, reference: Path, steps: range = range(STEPS)) -> dict[str, float]:
    """The same completions and metrics, up to the first draw that either token is right for (DESIGN.md, the same
    sample). Prints and returns the largest differences.
    """
    met = total = 0
    largest = {"metrics": 0.0, "logp": 0.0}
    ours, theirs = launch.metrics(directory), launch.metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for step in steps:
        one, two = (np.load(path / "draws" / f"{step}.npz") for path in (directory, reference))
        np.testing.assert_array_equal(one["group"], two["group"])
        N = two["margin"].shape[1]
        differs = (one["actions"] != two["actions"])[:, -N:] & two["mask"][:, -N:]
        close = (two["margin"] < CLOSE) & two["mask"][:, -N:]
        met, total = met + close.any(axis=1).sum(), total + len(close)
        if differs.any():
            before = np.cumsum(close, axis=1) == 0
            assert not (differs & before).any(), f"step {step}: other tokens away from every boundary"
            break  # from here on the two runs learn from other completions
        largest["logp"] = max(largest["logp"], np.abs(one["logp"] - two["logp"]).max())
        for name, value in theirs[step].items():
            if name == "ratio_std":  # a spread below 3e-4 is rounding of float32 means (`average_metrics`)
                continue
            assert ours[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
            largest["metrics"] = max(largest["metrics"], abs(ours[step][name] - value) / max(abs(value), 1.0))
    assert met <= 0.05 * total, f"{met} of {total} rows met a boundary"
    sys.stdout.write(f"{met} of {total} rows met a boundary; largest differences: {largest}\n")
    return largest


# --------------------------------------------------------------------------------------------------- one run on several


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_every_function_on_real_processes(processes):
    coordinator = f"127.0.0.1:{launch.free_port()}"
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "4" if processes == 2 else "8", "PYTHONPATH": str(launch.ROOT)}
    command = [sys.executable, "tests/distributed/primitives.py", coordinator, str(processes)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": launch.ROOT, "env": environ}
    started = [subprocess.Popen([*command, str(process)], **pipe) for process in range(processes)]
    ended = launch.wait(started, 120)
    assert [end.code for end in ended] == [0] * processes, ended
    assert all("passed" in end.output for end in ended)


def test_two_processes_of_two_devices_take_the_steps_of_one(flags, tmp_path):
    flags = [*flags, "--steps", "2", "--optimizer.schedule", "constant"]
    one = launch.start(SCRIPT, *flags, "--directory", str(tmp_path / "one"), processes=1, devices=4)
    two = launch.start(SCRIPT, *flags, "--directory", str(tmp_path / "two"), processes=2, devices=2)
    ended = launch.wait([*one, *two], 300)
    assert [end.code for end in ended] == [0, 0, 0], ended
    assert_same_run(tmp_path / "two", tmp_path / "one", range(2))
    assert "step 1/2" in ended[1].output
    assert "step" not in ended[2].output  # process 0 alone prints
    for name in ("config.json", "report.html", "model/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "two" / name).is_file()
    assert (tmp_path / "two" / "samples.jsonl").read_text().count("\n") == 2 * 4 * 8


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, {"fsdp": 8}), (2, {"fsdp": 4, "tensor": 2}), (4, {"fsdp": 8}), (4, {"fsdp": 2, "tensor": 4})],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_the_run_of_several_processes_is_that_of_one(processes, mesh, flags, reference, tmp_path):
    """Prompts do not divide over the processes; a tensor axis of 4 lies on two processes, which hold the same rows."""
    sizes = [word for name, size in mesh.items() for word in (f"--mesh.{name}", str(size))]
    how = {"processes": processes, "devices": 8 // processes}
    ended = launch.run(SCRIPT, *flags, *sizes, "--directory", str(tmp_path / "run"), **how)
    assert [end.code for end in ended] == [0] * processes, ended
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.nightly
def test_a_run_goes_on_with_another_number_of_processes(flags, reference, tmp_path):
    """2 -> 1 -> 2 processes, on three meshes; each time one process is told to end, and all save the same step."""
    directory = tmp_path / "run"
    flags = [*flags, "--directory", str(directory)]
    first = launch.start(SCRIPT, *flags, processes=2, devices=4, RLJAX_TEST_NAP="0.5")
    launch.wait_for_step(directory, 0, first)
    first[1].send_signal(signal.SIGTERM)
    assert [end.code for end in launch.wait(first)] == [143, 143]
    done = len(launch.metrics(directory))
    assert 0 < done < STEPS - 1
    assert str(done) in {path.name for path in (directory / "checkpoints").iterdir()}

    second = launch.start(SCRIPT, *flags, "--mesh.fsdp", "2", "--mesh.tensor", "2", processes=1, devices=4)
    launch.wait_for_step(directory, done, second)
    second[0].send_signal(signal.SIGTERM)
    (ended,) = launch.wait(second)
    assert ended.code in (143, 0), ended.output  # it may be over by then
    assert f"resumed after step {done} of {STEPS}" in ended.output
    last = launch.run(SCRIPT, *flags, "--mesh.fsdp", "4", "--mesh.tensor", "2", processes=2, devices=4)
    assert [end.code for end in last] == [0, 0], last
    assert_same_run(directory, reference)


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("when", "legal"),
    [
        ("before restore", {3}),
        pytest.param("after restore", {3, 4}, marks=pytest.mark.nightly),
        pytest.param("after a save", {5}, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_is_resumed_and_told_to_end_at_once_ends(when, legal, tmp_path):
    """All processes stop after the same step, long before the last."""
    state = TrainState(step=3, params={"w": jnp.zeros(3)}, opt_state=(), key=jax.random.key(0))
    with Run(tmp_path / "run", {}, steps=100) as run:
        run.save(run.restore(state))
    ended = launch.run("tests/distributed/told_to_end.py", str(tmp_path / "run"), when, processes=2, devices=1)
    assert [end.code for end in ended] == [143, 143], ended
    done = 3 + len(launch.metrics(tmp_path / "run"))
    assert done in legal
    assert f"stopped by signal 15 after step {done} of 100" in ended[0].output
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed_and_the_relaunch_continues(victim, flags, reference, tmp_path):
    directory = tmp_path / "run"
    flags = [*flags, "--directory", str(directory)]
    started = launch.start(SCRIPT, *flags, processes=2, devices=4, RLJAX_TEST_NAP="0.5")
    launch.wait_for_step(directory, 3, started)
    started[victim].kill()
    began = time.monotonic()
    ended = launch.wait(started, 120)
    assert time.monotonic() - began < 60  # a silence of 10 seconds, and what JAX takes to notice it
    assert ended[victim].code == -signal.SIGKILL
    assert ended[1 - victim].code in (EXIT_CODE, -signal.SIGABRT), ended  # what launchers start again on
    again = launch.run(SCRIPT, *flags, processes=2, devices=4)
    assert [end.code for end in again] == [0, 0], again
    assert "resumed after step" in again[0].output
    assert_same_run(directory, reference)


@pytest.mark.nightly
def test_a_step_that_hangs_ends_with_the_code_of_try_again(flags, tmp_path):
    """One process hangs on the host, the other waits for it in a collective: both say where, and end."""
    how = {"RLJAX_TEST_HANG": "1:2", "RLJAX_WATCHDOG_SECONDS": "100"}  # compiling the first step takes less
    flags = [*flags, "--directory", str(tmp_path / "run")]
    ended = launch.run(SCRIPT, *flags, processes=2, devices=4, **how)
    assert EXIT_CODE in [end.code for end in ended], ended
    assert all(end.code not in (0, -signal.SIGKILL) for end in ended), ended
    hung = ended[1].output
    assert "error: no step or evaluation has ended for" in hung
    assert "sample_and_keep" in hung  # the stack names the function that hangs
    again = launch.run(SCRIPT, *flags, processes=2, devices=4)
    assert [end.code for end in again] == [0, 0], again
    assert f"resumed after step 2 of {STEPS}" in again[0].output


@pytest.mark.nightly
def test_an_error_of_one_process_ends_all(flags, tmp_path):
    """A disk that is full on one machine, say. Both processes tell which one stopped, and why."""
    line = (
        "from rljax.rewards import score; "
        "score.decode_completions = lambda *_: (_ for _ in ()).throw(OSError('no space left'))"
    )
    directory = str(tmp_path / "run")
    ended = launch.run(SCRIPT, *flags, "--directory", directory, processes=2, devices=4, RLJAX_TEST_OTHER=f"1:{line}")
    assert [end.code for end in ended] == [1, 1], ended
    assert "error: process 1 stopped: no space left" in ended[0].output
    assert "error: no space left" in ended[1].output


def test_processes_that_disagree_are_told_in_what(flags, tmp_path):
    ended = launch.run(
        SCRIPT,
        *flags,
        "--directory",
        str(tmp_path / "run"),
        processes=2,
        devices=1,
        own={1: ["--seed", "7", "--batches.prompts", "3"]},
    )
    assert [end.code for end in ended] == [1, 1], ended
    for end in ended:
        assert "error: the processes disagree: --batches.prompts is 5 on process 0 and 3 on process 1; " in end.output
        assert "--seed is 1 on process 0 and 7 on process 1" in end.output
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["code", "data"])
def test_processes_with_other_code_or_data_are_told(kind, flags, tmp_path):
    lines = {
        "code": "from experiments.common import command_line as c; c.source_digest = lambda: 'another'",
        "data": "from experiments.common import data as d; r = d.read_rows; d.read_rows = lambda *a: list(r(*a))[:-1]",
    }
    how = {"processes": 2, "devices": 1, "RLJAX_TEST_OTHER": f"1:{lines[kind]}"}
    ended = launch.run(SCRIPT, *flags, "--directory", str(tmp_path / "run"), **how)
    assert [end.code for end in ended] == [1, 1], ended
    named = {"code": "code (sha256 of the sources) is", "data": "number of prompts is 12 on process 0 and 11 on"}[kind]
    assert all(f"error: the processes disagree: {named}" in end.output for end in ended), ended
    assert not (tmp_path / "run").exists()


def initialize(port: int, processes: int, process: int, deadline: float = 3.0) -> subprocess.Popen:
    code = (
        "import sys; from rljax.train import distributed as d\n"
        f"try: d.initialize('127.0.0.1:{port}', {processes}, {process}, deadline_seconds={deadline})\n"
        "except RuntimeError as error: print(f'error: {error}'); sys.exit(75 if d.is_lost_process(error) else 1)"
    )
    environ = os.environ | {"PYTHONPATH": str(launch.ROOT)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environ, **pipe)


@pytest.mark.nightly
def test_who_does_not_come_is_named_by_all_who_did():
    port = launch.free_port()
    present = [initialize(port, 4, 0, 15.0), initialize(port, 4, 2, 15.0)]
    ended = launch.wait(present, 60)
    for end in ended:
        assert end.code == EXIT_CODE
        assert end.output == "error: processes 1, 3 of 4 did not come within 15 seconds\n"


def test_a_coordinator_that_does_not_answer():
    port = launch.free_port()
    (ended,) = launch.wait([initialize(port, 2, 1)], 60)
    assert ended.code == EXIT_CODE
    assert ended.output == f"error: process 0 at 127.0.0.1:{port} did not answer within 3 seconds\n"


@pytest.mark.nightly
def test_processes_that_were_numbered_wrongly():
    port = launch.free_port()
    ended = launch.wait([initialize(port, 3, 0, 30.0), initialize(port, 3, 1, 30.0), initialize(port, 3, 1, 30.0)], 60)
    assert [end.code for end in ended] == [1, 1, 1], ended
    assert all("two processes say that they are number 1 of 3" in end.output for end in ended)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (ended,) = launch.wait([initialize(taken.getsockname()[1], 2, 0)], 60)
    assert ended.code == EXIT_CODE
    assert "cannot listen on port" in ended.output


@pytest.mark.nightly
def test_the_model_of_a_run_that_goes_on_is_another_one(flags, reference):
    """The directory of the model now holds another one: one error on every process, and the checkpoint stays."""
    model = Path(flags[flags.index("--model") + 1])
    other = RAW | {"hidden_size": 48}
    aside = model.with_name("aside")
    model.rename(aside)
    try:
        write_tokenizer(tiny.write(model, other, tiny.tensors_of(other)))
        ended = launch.run(SCRIPT, *flags, "--directory", str(reference), processes=2, devices=4)
    finally:
        shutil.rmtree(model)
        aside.rename(model)
    assert [end.code for end in ended] == [1, 1], ended
    for end in ended:
        assert f"has changed since {reference} was begun" in end.output
        assert "Traceback" not in end.output
    assert (reference / "checkpoints" / f"{STEPS}.sha256.json").is_file()
