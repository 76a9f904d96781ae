"""experiments/doctor.py: what it prints of a machine that is well, and that each check can fail."""

import importlib.metadata
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from distributed import launch
from experiments import doctor
from experiments.common import checks, settings
from experiments.common.checks import Finding
from rljax.train import distributed

CHECKS = ("versions", "devices", "mesh", "memory", "matmul", "all-reduce", "checkpoints", "clocks", "compilation cache")


def lines(text: str) -> dict[str, tuple[str, str]]:
    """check -> (verdict, text)"""
    return {
        line[9:27].strip(): (line[:8].strip(), line[28:]) for line in text.splitlines() if line[9:27].strip() in CHECKS
    }


def test_a_machine_that_is_well(tmp_path, capsys):
    verdicts = doctor.main(doctor.Config(directory=str(tmp_path / "runs"), mesh=settings.MeshShape(data=2)))
    assert "failed" not in verdicts
    found = lines(capsys.readouterr().out)
    assert tuple(found) == CHECKS
    assert f"jax {jax.__version__}" in found["versions"][1]
    assert found["devices"] == ("ok", "8 cpu, 1 processes with 8 each")
    assert found["mesh"] == ("ok", "data 2 x fsdp 4 x sequence 1 x expert 1 x tensor 1")
    assert "GB/s over 8 devices" in found["all-reduce"][1]
    assert "TFLOP/s a device in float32" in found["matmul"][1]
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_fails_is_told_and_the_rest_is_checked(tmp_path, capsys):
    (tmp_path / "file").touch()
    cfg = doctor.Config(directory=str(tmp_path / "file" / "runs"), mesh=settings.MeshShape(fsdp=3))
    with pytest.raises(SystemExit) as stop:
        doctor.main(cfg)
    assert stop.value.code == 1
    found = lines(capsys.readouterr().out)
    assert tuple(found) == CHECKS
    failed = {name: text for name, (verdict, text) in found.items() if verdict == "failed"}
    assert set(failed) == {"mesh", "checkpoints"}
    assert "does not cover 8 devices" in failed["mesh"]
    assert "legal: --directory DIR that can be written" in failed["checkpoints"]


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["flax>=0.12.8", "gone", "other; extra == 'dev'"])
    found = checks.check_versions()
    assert found.verdict == "failed"
    assert "gone is missing (wanted: gone)" in found.text
    assert "flax" not in found.text.partition(";")[2]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["flax>=99"])
    assert "(wanted: flax>=99): pip install -e ." in checks.check_versions().text


def finding_of(check) -> Finding:
    """What a check finds in one process."""
    (finding,) = doctor.run_check("check", check, 60.0)
    return finding


def test_a_sum_and_a_product_that_are_wrong(monkeypatch):
    assert finding_of(checks.check_all_reduce).verdict == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "psum", lambda x, name: 8 * x)
        found = finding_of(checks.check_all_reduce)
        assert (found.verdict, "require replication" in found.text) == (
            "failed",
            True,
        )  # jax sees that devices may differ
        patch.setattr(jax.lax, "psum", lambda x, name: 2 * jax.lax.pmax(x, name))
        assert finding_of(checks.check_all_reduce) == Finding(
            "failed", "a wrong sum: look at the driver and at the network"
        )
    monkeypatch.setattr(checks.jnp, "matmul", lambda a, b, **_: a + b)
    assert "a wrong product" in finding_of(checks.check_matmul).text


def test_a_program_that_is_not_read_back(monkeypatch):
    assert finding_of(checks.check_cache).verdict == "ok"
    monkeypatch.setattr(checks, "compile_probe", lambda: (0.1, False))
    assert finding_of(checks.check_cache).verdict == "warning"


def on_processes(monkeypatch, count: int, call) -> list:
    """What `call` returns on each of so many processes: threads here, which wait for each other in an exchange."""
    barrier, own, told = threading.Barrier(count, timeout=10), threading.local(), [None] * count

    def exchange(name, value, deadline_seconds=0.0):
        told[own.process] = value
        barrier.wait()
        everyone = list(told)
        barrier.wait()
        return everyone

    def run(process):
        own.process = process
        return call(process)

    monkeypatch.setattr(distributed, "exchange", exchange)
    monkeypatch.setattr(distributed, "process_count", lambda: count)
    monkeypatch.setattr(distributed, "process_index", lambda: own.process)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def slow(process):
    return Finding("ok", f"{min((yield process))}")


def broken(process):
    if process == 1:
        raise RuntimeError("no such driver")
    return Finding("ok", f"{min((yield process))}")


def late(process):
    everyone = yield process
    if process == 1:
        return Finding("failed", "gone")
    return Finding("ok", f"{min((yield everyone))}")


@pytest.mark.parametrize(
    ("check", "merged"),
    [
        (slow, Finding("ok", "0")),
        (broken, Finding("failed", "no such driver (process 1)")),
        (late, Finding("failed", "gone (process 1)")),
    ],
)
def test_a_check_that_one_process_cannot_go_on_with_is_over_for_all(check, merged, monkeypatch):
    every = on_processes(monkeypatch, 3, lambda process: doctor.run_check("check", lambda: check(process), 5.0))
    assert [doctor.merged(everyone) for everyone in every] == [[merged]] * 3
    assert {doctor.worst(everyone) for everyone in every} == {merged.verdict}


def test_a_process_that_cannot_write_is_named_by_all(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    places = [tmp_path / "runs", tmp_path / "file" / "runs"]

    def check(process):
        return doctor.run_check("checkpoints", lambda: checks.check_directory(str(places[process])), 5.0)

    for everyone in on_processes(monkeypatch, 2, check):
        (failed,) = doctor.merged(everyone)
        assert failed.verdict == "failed"
        assert failed.text.endswith("legal: --directory DIR that can be written (process 1)")
    assert list((tmp_path / "runs").iterdir()) == []


def test_findings_of_several_processes_are_merged():
    ok, slow = Finding("ok", "fine"), Finding("warning", "slow")
    assert doctor.merged([ok, ok, ok]) == [ok]
    assert doctor.merged([ok, slow, ok]) == [
        Finding("warning", "slow (process 1)"),
        Finding("ok", "fine (process 0, 2)"),
    ]
    assert doctor.worst([ok, slow]) == "warning"
    many = [Finding("ok", str(i)) for i in range(40)] + [Finding("failed", "gone")]
    assert len(doctor.merged(many)) == doctor.LINES
    assert doctor.merged(many)[0] == Finding("failed", "gone (process 40)")


def test_a_check_that_hangs_ends_the_process(monkeypatch, capsys):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(doctor.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with doctor.deadline("all-reduce", 0.01):
        assert ended.wait(60)
    assert codes == [1]
    assert "error: all-reduce: not done after 0.01 seconds" in capsys.readouterr().out


@pytest.mark.nightly
def test_two_processes_that_do_not_share_a_disk(tmp_path):
    """Each in a folder of its own, so that --directory is another one."""
    port = launch.free_port()
    started = []
    for process in range(2):
        own = tmp_path / str(process)
        own.mkdir()
        hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.processes", "2", "--hosts.process", str(process)]
        command = [sys.executable, str(launch.ROOT / "experiments" / "doctor.py"), "--directory", "runs", *hosts]
        environ = launch.os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(launch.ROOT)}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environ, cwd=own, **pipe))
    ended = launch.wait(started)
    assert [one.code for one in ended] == [1, 1], ended
    found = lines(ended[0].output)
    assert tuple(found) == CHECKS
    assert {name for name, (verdict, _) in found.items() if verdict == "failed"} == {"checkpoints"}
    assert found["devices"] == ("ok", "4 cpu, 2 processes with 2 each")
    assert "seconds apart" in found["clocks"][1]
    assert "what process" in ended[0].output
    assert lines(ended[1].output) == {}
    assert not any(Path(tmp_path).glob("*/runs/*"))
