"""The process that calls verifiers: `python -m rljax.rewards.worker FD MEGABYTES`, started by `rljax.rewards.pool`.

It imports no JAX and no numpy, so that it starts in tens of milliseconds. It answers each message on the pipe FD:
("load", pickled function) with None or an error text; ("call", args, kwargs) with the fields of a `Result`. It ends
when the pipe closes; on Linux the kernel kills it when the thread that started it ends, even while it is busy.
"""

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real
from typing import Literal, NamedTuple

from rljax.rewards.function_path import unpickle_function

MAX_FLOAT32 = 3.4028234663852886e38  # scores are float32
NETWORK_EVENTS = {
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"),
    *("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"),
}


class CouldNotJudge(RuntimeError):
    """A verifier raises it where what it judges with failed, so that the row is not judged (status "died")."""


class Result(NamedTuple):
    """The outcome of one call. `value` is a number only if the status is "ok".

    none: the verifier does not apply to this row. FAILED: it failed on this row (timeout: no answer in time; died: its
    process ended or ran out of memory; unreachable: its server refused or broke off; invalid: its server answered
    something else than a finite number, or a model's score is NaN). error: it raised or returned something else than a
    finite number, which is a bug in the verifier.
    """

    value: float | None
    status: Literal["ok", "none", "timeout", "died", "unreachable", "invalid", "error"]
    detail: str = ""


FAILED = ("timeout", "died", "unreachable", "invalid")  # statuses of a row that could not be judged


def call_verifier(function: Callable, args: tuple, kwargs: dict) -> Result:
    """Call a verifier. Never raises, except on an interruption of the process itself."""
    try:
        value = function(*args, **kwargs)
    except MemoryError:
        return Result(None, "died", "out of memory")
    except CouldNotJudge as error:
        return Result(None, "died", str(error))
    except (Exception, SystemExit) as error:
        return Result(None, "error", _format_error(error))
    if value is None:
        return Result(None, "none")
    number = _number(value)
    if not abs(number) <= MAX_FLOAT32:
        return Result(None, "error", f"it returned {repr(value)[:200]} ({type(value).__name__})")
    return Result(number, "ok")


def _number(value) -> float:
    """A bool, int, float, Fraction or scalar array as a float; NaN for everything else."""
    scalar = getattr(getattr(value, "dtype", None), "kind", "") in "biuf" and getattr(value, "shape", None) == ()
    if not (scalar or isinstance(value, Real)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _format_error(error: BaseException) -> str:
    """The error and the last lines of its traceback, without the frame of `call_verifier`."""
    lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next, limit=-3)
    return "".join(lines).strip()[-2000:]


# -------------------------------------------------------------------------------------------------- isolation


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends. Linux only; elsewhere a busy worker outlives a killed parent."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig, sigkill = 1, 9
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, sigkill)


def refuse_network() -> None:
    """Make Python's sockets raise PermissionError; unnamed local pairs stay legal. Cannot be undone."""

    def hook(event, args):
        # Families: 1 is AF_UNIX, which socket.socketpair() needs; the sandbox sends descriptors through such a pair.
        if event == "socket.sendmsg" and args[0].family == 1 and args[1] is None:
            return
        if event in NETWORK_EVENTS or (event == "socket.__new__" and args[1] != 1):
            raise PermissionError("no network in the reward pool")

    sys.addaudithook(hook)


def limit_memory(megabytes: int | None) -> None:
    """Let the address space of this process grow by this much from its current size; None: without limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; macOS refuses RLIMIT_AS
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = hard
        if megabytes is not None:
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            soft = size + megabytes * 2**20
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# ------------------------------------------------------------------------------------------------------------- the loop


def main(descriptor: int, megabytes: int) -> None:
    """Answer messages until the pipe closes."""
    os.set_inheritable(descriptor, False)
    die_with_parent()
    refuse_network()
    pipe = Connection(descriptor)
    functions: dict[bytes, Callable] = {}
    function = None
    while True:
        try:
            kind, *parts = pipe.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # an argument that this process cannot rebuild
            pipe.send(Result(None, "error", f"an argument could not be unpickled: {_format_error(error)}")[:])
            continue
        if kind == "call":
            pipe.send(call_verifier(function, *parts)[:])
            continue
        (pickled,) = parts
        limit_memory(None)  # importing is the verifier's own size, not its growth
        problem = None
        try:
            if pickled not in functions:
                functions[pickled] = unpickle_function(pickled)
            function = functions[pickled]
        except (Exception, SystemExit) as error:
            problem = _format_error(error)
        limit_memory(megabytes)
        pipe.send(problem)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
