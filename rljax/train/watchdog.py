"""A thread that ends a run which no longer moves, so that a scheduler starts it again from its checkpoint.

A collective whose partner is gone, a file system that does not answer, a server without a deadline: a process that
waits for one of these waits for ever, and holds its accelerators. The thread prints where every thread of the process
stands and exits with code 75, which schedulers take as "try again".

What takes long outside of steps gives signs of life: each evaluation, each file of a checkpoint that is read, each
parameter of a model that is written. The same limit holds between two of them, so that a hang after the last step ends
the run too.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
FLOOR_SECONDS = 1800.0  # compiling a large model or evaluating it takes minutes between two steps


_last_sign = 0.0  # of life, of this process


def sign_of_life() -> None:
    """Say that something long has ended which is no step. It does not count in the median."""
    global _last_sign
    _last_sign = time.monotonic()


class Watchdog:
    """Ends the process where no step has ended, and no sign of life was given, within max(factor x median of the last
    steps, floor).

    Args:
      factor: of the median time between the ends of steps. floor_seconds: at least so long; 0: it never ends the run.
        By default RLJAX_WATCHDOG_SECONDS of the environment, or half an hour.
    """

    def __init__(self, factor: float = 10.0, floor_seconds: float | None = None):
        if floor_seconds is None:
            floor_seconds = float(os.environ.get("RLJAX_WATCHDOG_SECONDS", FLOOR_SECONDS))
        if factor < 1 or floor_seconds < 0:
            raise ValueError(f"watchdog: factor {factor:g}, floor_seconds {floor_seconds:g}; legal: at least 1 and 0")
        self.factor = factor
        self.floor_seconds = floor_seconds
        self._durations: deque[float] = deque(maxlen=100)
        self._moved = time.monotonic()
        self._stopped = threading.Event()

    def start(self, linger_seconds: float = 0.0) -> None:
        """Begin to watch; the time to the first step counts too.

        linger_seconds: between the last words and the end. Process 0 takes some, as JAX ends the others with it, and
        they are to say where they stand.
        """
        self._moved = time.monotonic()
        self._linger_seconds = linger_seconds
        if self.floor_seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def step_ended(self) -> None:
        now = time.monotonic()
        self._durations.append(now - self._moved)
        self._moved = now

    def stop(self) -> None:
        self._stopped.set()

    def limit_seconds(self) -> float:
        """How long a step may take."""
        median = statistics.median(self._durations) if self._durations else 0.0
        return max(self.factor * median, self.floor_seconds)

    def _watch(self) -> None:
        while not self._stopped.wait(min(self.floor_seconds / 10, 1.0)):
            waited = time.monotonic() - max(self._moved, _last_sign)
            if waited > self.limit_seconds():
                self._end_process(waited)

    def _end_process(self, waited: float) -> None:
        sys.__stderr__.write(  # not through the console: the thread that hangs may hold its lock
            f"error: no step or evaluation has ended for {waited:.0f} seconds (limit {self.limit_seconds():.0f}); "
            f"exit code {EXIT_CODE}, run the same command again to resume. Where every thread stands:\n"
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        sys.__stderr__.flush()
        time.sleep(self._linger_seconds)
        os._exit(EXIT_CODE)
