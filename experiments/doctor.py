r"""Is this machine, or this slice, ready to train? Everything a run needs, checked within a minute.

    python experiments/doctor.py                                      # this machine
    python experiments/doctor.py --directory /shared/runs --mesh.fsdp 16      # the same on every host of a slice

Each line says `ok`, `warning` or `failed`, what was found, and what to do. Where processes differ, each has its line.
The exit code is 1 where a check failed, on every process; warnings leave it at 0.

    versions             what setup.py asks for, and what is installed
    devices              their kind and number, the same on every process
    mesh                 the axes of --mesh cover them
    memory               of devices and host
    matmul               FLOP/s of each device by itself, and a right result
    all-reduce           bandwidth over all devices, and a right sum
    checkpoints          --directory can be written from every process, and each sees what the others write
    clocks               of all processes
    compilation cache    a program that was compiled is read back

Reached: not yet run on an accelerator.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from experiments.common import checks, command_line
from experiments.common.checks import VERDICTS, Finding
from experiments.common.settings import MeshShape, Rare
from rljax.train import distributed
from rljax.train.log import log_error, log_info

COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}
LINES = 8  # most of a check


@dataclasses.dataclass(frozen=True)
class Config:
    """Checks of an installation or a slice."""

    directory: str = "runs"  # where runs will write their checkpoints; every host must see the same directory
    mesh: MeshShape = MeshShape()
    deadline_seconds: Rare[float] = 60.0  # for one check; a check that takes longer fails


def main(cfg: Config) -> list[str]:
    """Run every check; print its lines; return the verdicts. Exits with code 1 where one failed."""
    to_check = {
        "versions": checks.check_versions,
        "devices": checks.check_devices,
        "mesh": lambda: checks.check_mesh(cfg.mesh),
        "memory": checks.check_memory,
        "matmul": checks.check_matmul,
        "all-reduce": checks.check_all_reduce,
        "checkpoints": lambda: checks.check_directory(cfg.directory),
        "clocks": checks.check_clocks,
        "compilation cache": checks.check_cache,
    }
    verdicts = []
    for name, check in to_check.items():
        with deadline(name, cfg.deadline_seconds):
            finding = try_check(check)
        everyone = distributed.exchange(f"doctor {name}", finding, cfg.deadline_seconds)
        for finding in merged(everyone):
            log_info(f"{finding.verdict:8} {name:18} {finding.text}", COLORS[finding.verdict])
        verdicts.append(worst(everyone))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    log_info(f"{len(to_check)} checks on {distributed.process_count()} processes: {counts}")
    if "failed" in verdicts:
        raise SystemExit(1)
    return verdicts


def try_check(check: Callable[[], Finding]) -> Finding:
    """What the check finds; an error is a failure."""
    try:
        return check()
    except (ValueError, OSError, RuntimeError) as error:
        return Finding("failed", str(error).partition("\n")[0])


def worst(findings: Sequence[Finding]) -> str:
    """The gravest verdict."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index)


def merged(everyone: Sequence[Finding]) -> list[Finding]:
    """One finding where all processes have the same, else one for each that differs, which names its processes."""
    processes: dict[Finding, list[int]] = {}
    for process, finding in enumerate(everyone):
        processes.setdefault(finding, []).append(process)
    if len(processes) == 1:
        return [everyone[0]]
    gravest_first = sorted(processes.items(), key=lambda item: -VERDICTS.index(item[0].verdict))
    return [
        Finding(verdict, f"{text} (process {', '.join(map(str, numbers))})")
        for (verdict, text), numbers in gravest_first[:LINES]
    ]


@contextlib.contextmanager
def deadline(name: str, seconds: float) -> Iterator[None]:
    """End this process with exit code 1 where the block takes longer: a collective that hangs cannot be interrupted."""

    def give_up() -> None:
        problem = (
            f"{name}: not done after {seconds:g} seconds; the hosts may not reach each other: look at firewalls, and "
            "on GPUs at what NCCL_DEBUG=INFO prints"
        )
        log_error(problem)
        distributed.stop_others(problem)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    command_line.run(Config, main, makes_run=False)
