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
from typing import Any

from experiments.common import checks, command_line
from experiments.common.checks import VERDICTS, Finding, Steps
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
    deadline_seconds: Rare[float] = 60.0  # for one step of a check; one that takes longer fails


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
        everyone = run_check(name, check, cfg.deadline_seconds)
        for finding in merged(everyone):
            log_info(f"{finding.verdict:8} {name:18} {finding.text}", COLORS[finding.verdict])
        verdicts.append(worst(everyone))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    log_info(f"{len(to_check)} checks on {distributed.process_count()} processes: {counts}")
    if "failed" in verdicts:
        raise SystemExit(1)
    return verdicts


def run_check(name: str, check: Callable[[], Finding | Steps], seconds: float) -> list[Finding | None]:
    """What the check finds on each process, the same on all; it is over as soon as one of them has a finding.

    None for a process that has none by then. seconds: for a step of the check, and for the others to come to its end.
    """
    steps = steps_of(check)
    everyone: list[Any] | None = None
    while everyone is None or not any(isinstance(step, Finding) for step in everyone):
        with deadline(name, seconds):
            step = next_step(steps, everyone)
        if isinstance(step, Finding) and step.verdict == "failed" and distributed.process_count() > 1:
            log_error(f"{name}: {step.text}")  # now, as the others may wait in a collective until they give up
        everyone = distributed.exchange(f"doctor {name}", step, seconds)
    steps.close()
    return [step if isinstance(step, Finding) else None for step in everyone]


def steps_of(check: Callable[[], Finding | Steps]) -> Steps:
    """The check as a generator."""
    found = check()
    return found if isinstance(found, Finding) else (yield from found)


def next_step(steps: Steps, everyone: list | None) -> Any:
    """What the check yields next, or at its end what it finds; an error is a failure."""
    try:
        return steps.send(everyone)
    except StopIteration as end:
        return end.value
    except (ValueError, OSError, RuntimeError) as error:
        return Finding("failed", str(error).partition("\n")[0])


def worst(everyone: Sequence[Finding | None]) -> str:
    """The gravest verdict."""
    return max((finding.verdict for finding in everyone if finding), key=VERDICTS.index)


def merged(everyone: Sequence[Finding | None]) -> list[Finding]:
    """One finding where all processes have the same, else one for each that differs, which names its processes."""
    processes: dict[Finding, list[int]] = {}
    for process, finding in enumerate(everyone):
        if finding:
            processes.setdefault(finding, []).append(process)
    if len(processes) == 1 and None not in everyone:
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
