"""The isolated pool: calls functions in processes that can be killed, so that no verifier hangs or ends the training.

Prevented: running past the deadline (the worker's whole process group is killed), growing past the memory limit, taking
the training process down, Python sockets, an accelerator being seized, leftovers after `recycle` calls, and (on Linux)
workers that outlive the process that started them.

Not yet prevented, so do not run a model's code in it: reading and writing files, the environment's secrets, starting
programs (they have a network; one that opens a session of its own survives the kill), sockets made by C code, a
verifier that lifts its own limits.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from rljax.rewards.function_path import name_of, refer
from rljax.rewards.worker import Result

LOADING = -1  # the task of a worker that is starting, or importing its function
START_SECONDS = 120.0  # for that; a script may import much


class Pool:
    """`workers` processes, started when first needed. One `map` at a time.

    Call `map` from a thread that lives as long as the pool: Linux ends a worker with the thread that started it.

    Args:
      workers: processes at once. seconds: wall clock for one call, without start-up and imports.
      megabytes: by how much a worker may grow beyond its own imports. recycle: calls after which a worker is replaced.
    """

    def __init__(self, workers: int = 2, seconds: float = 5.0, megabytes: int = 1024, recycle: int = 500):
        for name, value in {"workers": workers, "seconds": seconds, "megabytes": megabytes, "recycle": recycle}.items():
            if not value > 0:
                raise ValueError(f"Pool({name}={value}); it must be positive")
        self.workers, self.seconds, self.megabytes, self.recycle = workers, seconds, megabytes, recycle
        self._team: list[_Worker] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Kill the workers. A later `map` starts new ones."""
        for worker in list(self._team):
            self._dismiss(worker)

    def map(self, function: Callable, items: Sequence[tuple[tuple, dict]]) -> list[Result]:
        """`function(*args, **kwargs)` for each (args, kwargs), as Results in the order of the items.

        Raises ValueError if the function cannot travel (see `reference`), RuntimeError if no worker can load it.
        """
        reference, items = refer(function), list(items)
        results, left = [None] * len(items), deque(range(len(items)))
        try:
            for worker in list(self._team):
                if worker.pipe.poll():  # idle workers say nothing: this one has ended
                    self._dismiss(worker)
            while left or self._busy():
                self._employ(reference, items, left)
                for worker, answered in self._reports():
                    task, worker.task = worker.task, None
                    if task == LOADING:
                        self._check_loaded(worker, answered, function)
                        continue
                    late = Result(None, "timeout", f"no answer within {self.seconds:g} s")
                    results[task] = worker.result() if answered else late
                    worker.calls += 1
                    if results[task].status in ("timeout", "died") or worker.calls >= self.recycle:
                        self._dismiss(worker)
        finally:  # interrupted: an answer still to come would be taken for one of the next items
            for worker in self._busy():
                self._dismiss(worker)
        return results

    def _busy(self) -> list["_Worker"]:
        return [worker for worker in self._team if worker.task is not None]

    def _employ(self, reference: bytes, items: list, left: deque) -> None:
        """Hire up to the number wanted, and give every idle worker its next message."""
        coming = sum(worker.task in (None, LOADING) for worker in self._team)
        for _ in range(min(self.workers - len(self._team), len(left) - coming)):
            self._team.append(_Worker(self.megabytes))
        for worker in self._team:
            if worker.task is None and left and worker.reference != reference:
                worker.reference = reference
                worker.give(LOADING, START_SECONDS, ("load", reference))
            elif worker.task is None and left:
                args, kwargs = items[left[0]]
                worker.give(left.popleft(), self.seconds, ("call", args, kwargs))

    def _reports(self) -> list[tuple["_Worker", bool]]:
        """Wait for an answer or a deadline; which workers answered (or ended), and which are late."""
        busy = self._busy()
        pause = min(worker.deadline for worker in busy) - time.monotonic()
        ready = set(wait([worker.pipe for worker in busy], max(pause, 0)))
        now = time.monotonic()
        return [(w, w.pipe in ready) for w in busy if w.pipe in ready or w.deadline <= now]

    def _check_loaded(self, worker: "_Worker", answered: bool, function: Callable) -> None:
        problem = worker.loaded() if answered else f"no answer within {START_SECONDS:g} s"
        if problem is not None:
            self._dismiss(worker)
            raise RuntimeError(f"a worker process could not load {name_of(function)}: {problem}")

    def _dismiss(self, worker: "_Worker") -> None:
        self._team.remove(worker)
        worker.kill()


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, megabytes: int):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P and PYTHONPATH: the modules of this process, whatever folder it runs in
                [sys.executable, "-P", "-m", "rljax.rewards.worker", str(theirs.fileno()), str(megabytes)],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.pipe = Connection(ours.detach())
        self.reference: bytes | None = None  # the function loaded in it
        self.task: int | None = None  # index of the item it works on; LOADING; None: idle
        self.deadline = 0.0
        self.calls = 0

    def give(self, task: int, seconds: float, message: tuple) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        try:
            self.pipe.send(message)
        except OSError:
            pass  # it has ended: that its pipe is closed will be its answer
        except Exception as error:
            error.add_note("an argument of Pool.map cannot be pickled, so it cannot travel to a worker process")
            raise

    def result(self) -> Result:
        try:
            return Result(*self.pipe.recv())
        except (EOFError, OSError):
            return Result(None, "died", self.kill())

    def loaded(self) -> str | None:
        """None if the function is loaded, else why not."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return f"it ended with {self.kill()}"

    def kill(self) -> str:
        """End the process and its group, at once. Returns how it had ended."""
        self.pipe.close()
        if self.process.returncode is None:  # not yet reaped, so its number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for a zombie
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _environment() -> dict[str, str]:
    """This process's, without accelerators, single-threaded, and with the same order of sets in every worker."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    devices = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **devices, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
