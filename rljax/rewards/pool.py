"""A pool of isolated worker processes that call verifiers, so that no verifier hangs or ends the training.

Prevented: running past the deadline (the worker's whole process group is killed), growing past the memory limit, ending
the training process, Python sockets, taking an accelerator, state left over after `max_calls` calls, and (on Linux)
workers that outlive the process that started them.

Not prevented, so do not run a model's code in it: reading and writing files, the environment's secrets, starting
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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from rljax.rewards.function_path import function_name, pickle_function
from rljax.rewards.worker import Result

LOADING = (-1, -1)  # the task of a worker that is starting, or importing its function
LOADING_SECONDS = 120.0  # deadline for that; a script may import much

Call = tuple[tuple, dict[str, Any]]  # (args, kwargs)


class _Queue(NamedTuple):
    """A function and which of its calls no worker has been given yet."""

    function: bytes  # pickled
    name: str
    calls: list[Call]
    waiting: deque[int]


class Pool:
    """`workers` processes, started when first needed. One `map` or `map_each` at a time.

    Call `map` from a thread that lives as long as the pool: Linux ends a worker with the thread that started it.

    Args:
      workers: processes at a time. timeout_seconds: wall clock for one call, without start-up and imports.
      memory_megabytes: by how much a worker may grow beyond its own imports. max_calls: calls before a worker is
        replaced.
    """

    def __init__(
        self, workers: int = 2, timeout_seconds: float = 5.0, memory_megabytes: int = 1024, max_calls: int = 500
    ):
        settings = {
            "workers": workers,
            "timeout_seconds": timeout_seconds,
            "memory_megabytes": memory_megabytes,
            "max_calls": max_calls,
        }
        for name, value in settings.items():
            if not value > 0:
                raise ValueError(f"Pool({name}={value}); it must be positive")
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.memory_megabytes = memory_megabytes
        self.max_calls = max_calls
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Kill the workers. A later `map` starts new ones."""
        for worker in list(self._workers):
            self._remove(worker)

    def map(self, function: Callable, calls: Sequence[Call]) -> list[Result]:
        """`function(*args, **kwargs)` for each (args, kwargs), as Results in the order of the calls.

        Raises ValueError if the function cannot be pickled (see `function_path`), RuntimeError if no worker can load
        it.
        """
        (results,) = self.map_each([(function, calls)])
        return results

    def map_each(self, work: Sequence[tuple[Callable, Sequence[Call]]]) -> list[list[Result]]:
        """Each function on its own calls, all of them side by side: for each function its Results, as of `map`.

        A worker that is free takes a call of the function that the fewest workers are busy with: a slow function keeps
        no other from being called. The Results are those of one function after another.
        """
        queues = []
        for function, calls in work:
            calls = list(calls)
            queues.append(_Queue(pickle_function(function), function_name(function), calls, deque(range(len(calls)))))
        results: list[list[Result | None]] = [[None] * len(queue.calls) for queue in queues]
        names = {queue.function: queue.name for queue in queues}
        try:
            self._remove_ended()
            while any(queue.waiting for queue in queues) or self._busy():
                self._start_workers(sum(len(queue.waiting) for queue in queues))
                self._assign(queues)
                for worker, has_answered in self._wait():
                    task = worker.task
                    worker.task = None
                    if task == LOADING:
                        self._check_loaded(worker, has_answered, names[worker.function])
                    else:
                        which, call = task
                        results[which][call] = self._finish(worker, has_answered)
        finally:  # when interrupted: an answer still to come would be taken for that of a later call
            for worker in self._busy():
                self._remove(worker)
        return results

    def _busy(self) -> list["_Worker"]:
        return [worker for worker in self._workers if worker.task is not None]

    def _remove_ended(self) -> None:
        for worker in list(self._workers):
            if worker.pipe.poll():  # an idle worker sends nothing: this one has ended
                self._remove(worker)

    def _start_workers(self, waiting: int) -> None:
        """Start as many workers as there are calls that no idle or starting worker will take."""
        available = sum(worker.task in (None, LOADING) for worker in self._workers)
        for _ in range(min(self.workers - len(self._workers), waiting - available)):
            self._workers.append(_Worker(self.memory_megabytes))

    def _assign(self, queues: list[_Queue]) -> None:
        """Give every idle worker its next message: the function to load, or a call."""
        for worker in self._workers:
            which = None if worker.task is not None else self._next_queue(worker, queues)
            if which is None:
                continue
            queue = queues[which]
            if worker.function != queue.function:
                worker.function = queue.function
                worker.send(LOADING, LOADING_SECONDS, ("load", queue.function))
            else:
                call = queue.waiting.popleft()
                worker.send((which, call), self.timeout_seconds, ("call", *queue.calls[call]))

    def _next_queue(self, worker: "_Worker", queues: list[_Queue]) -> int | None:
        """The queue with calls left at whose function the fewest workers are; of several, that which is loaded."""
        at = Counter(other.function for other in self._busy())
        with_calls = [i for i, queue in enumerate(queues) if queue.waiting]
        return min(
            with_calls,
            key=lambda i: (at[queues[i].function], queues[i].function != worker.function),
            default=None,
        )

    def _wait(self) -> list[tuple["_Worker", bool]]:
        """Wait for an answer or a deadline: the workers that answered or ended (True), and those past it (False)."""
        busy = self._busy()
        seconds = min(worker.deadline for worker in busy) - time.monotonic()
        ready = set(wait([worker.pipe for worker in busy], max(seconds, 0)))
        now = time.monotonic()
        return [(w, w.pipe in ready) for w in busy if w.pipe in ready or w.deadline <= now]

    def _finish(self, worker: "_Worker", has_answered: bool) -> Result:
        """The result of the worker's call. A worker that failed, or has made all its calls, is removed."""
        if has_answered:
            result = worker.receive_result()
        else:
            result = Result(None, "timeout", f"no answer within {self.timeout_seconds:g} s")
        worker.calls += 1
        if result.status in ("timeout", "died") or worker.calls >= self.max_calls:
            self._remove(worker)
        return result

    def _check_loaded(self, worker: "_Worker", has_answered: bool, name: str) -> None:
        problem = worker.receive_problem() if has_answered else f"no answer within {LOADING_SECONDS:g} s"
        if problem is not None:
            self._remove(worker)
            raise RuntimeError(f"a worker process could not load {name}: {problem}")

    def _remove(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, memory_megabytes: int):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P and PYTHONPATH: the modules of this process, whatever folder it runs in
                [sys.executable, "-P", "-m", "rljax.rewards.worker", str(theirs.fileno()), str(memory_megabytes)],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_worker_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.pipe = Connection(ours.detach())
        self.function: bytes | None = None  # the pickled function that it has loaded
        self.task: tuple[int, int] | None = None  # its call, as (queue, index); LOADING; None: idle
        self.deadline = 0.0
        self.calls = 0

    def send(self, task: tuple[int, int], seconds: float, message: tuple) -> None:
        self.task = task
        self.deadline = time.monotonic() + seconds
        try:
            self.pipe.send(message)
        except OSError:
            pass  # it has ended: its closed pipe will be its answer
        except Exception as error:
            error.add_note("an argument of Pool.map cannot be pickled, so it cannot be sent to a worker process")
            raise

    def receive_result(self) -> Result:
        try:
            return Result(*self.pipe.recv())
        except (EOFError, OSError):
            return Result(None, "died", self.kill())

    def receive_problem(self) -> str | None:
        """None if the function is loaded, else why it is not."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return f"it ended with {self.kill()}"

    def kill(self) -> str:
        """Kill the process and its group at once. Returns how the process ended."""
        self.pipe.close()
        if self.process.returncode is None:  # not yet reaped, so its id is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for a zombie
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _worker_environment() -> dict[str, str]:
    """This process's, without accelerators, single-threaded, and with the same order of sets in every worker."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    devices = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **devices, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
