"""Several processes of one script on this machine, each with its own virtual CPU devices, and what they leave."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rljax.train.log import MACHINE_METRICS

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """One process that has ended."""

    code: int
    output: str  # stdout and stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script: str, *flags: str, processes: int, devices: int, own: dict[int, list[str]] | None = None, **environ):
    """The processes, started. own: further flags of one of them."""
    coordinator = f"127.0.0.1:{free_port()}"
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)} | environ
    started = []
    for process in range(processes):
        hosts = ["--hosts.coordinator", coordinator, "--hosts.processes", str(processes)]
        hosts = [*hosts, "--hosts.process", str(process)] if processes > 1 else []
        command = [sys.executable, str(ROOT / script), *flags, *hosts, *(own or {}).get(process, [])]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environ, cwd=ROOT, **pipe))
    return started


def wait(started: list[subprocess.Popen], seconds: float = 400.0) -> list[Ended]:
    """Every process with what it printed. One that is still there after so many seconds is killed: code -9."""
    deadline = time.monotonic() + seconds
    ended = []
    for process in started:
        try:
            output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        ended.append(Ended(process.returncode, output))
    return ended


def run(script: str, *flags: str, seconds: float = 400.0, **how) -> list[Ended]:
    """`start` and `wait`."""
    return wait(start(script, *flags, **how), seconds)


def metrics(directory: Path) -> list[dict[str, float]]:
    """What a run logged, without what the clock says."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.endswith(MACHINE_METRICS)}
        for line in lines
    ]


def wait_for_step(directory: Path, step: int, started: list[subprocess.Popen], seconds: float = 300.0) -> None:
    """Until the run has logged this step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log = directory / "metrics.jsonl"
        if log.is_file() and len(log.read_text().splitlines()) > step:
            return
        if any(process.poll() is not None for process in started):
            raise RuntimeError(
                f"a process ended before step {step}: {[ended.output[-2000:] for ended in wait(started, 20)]}"
            )
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was not logged in {seconds:g} seconds")
