"""Calls side by side in threads, each with a deadline of its own.

A thread cannot be killed. One that runs past its deadline is left behind, and its answer is dropped; where many such
threads are still busy, the next call is refused. Code that holds the interpreter's lock for long (one regular
expression on hostile text, say) delays every thread: what a model wrote runs in a process of its own.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MAX_LEFT_BEHIND = 32  # threads of one name that may be busy past their deadline


class Called(NamedTuple):
    """What became of a call. `value` is what it returned where the status is "ok"."""

    value: Any
    status: Literal["ok", "raised", "timeout"]
    detail: str = ""


@dataclass
class _Caller:
    """A thread that makes one call after another."""

    call: int  # that it is making
    deadline: float
    done: bool = False
    thread: threading.Thread | None = None


def call_each(calls: Sequence[Callable[[], Any]], timeout_seconds: float, workers: int, name: str) -> list[Called]:
    """Call each function, `workers` at a time; the results in their order. The deadline begins when a call begins.

    name: what is called, for errors. Raises RuntimeError where `MAX_LEFT_BEHIND` earlier calls of this name still run.
    """
    left_behind = f"left behind: {name}"
    still_running = sum(thread.name == left_behind for thread in threading.enumerate())
    if still_running >= MAX_LEFT_BEHIND:
        raise RuntimeError(f"{name}: {still_running} calls still run past their deadline of {timeout_seconds:g} s")
    waiting = deque(range(len(calls)))
    results: list[Any] = [None] * len(calls)
    changed = threading.Condition()

    def work(caller: _Caller) -> None:
        while not caller.done:
            called = _call(calls[caller.call])
            with changed:
                if caller.done:  # too late
                    return
                results[caller.call] = called
                if waiting:
                    caller.call, caller.deadline = waiting.popleft(), time.monotonic() + timeout_seconds
                else:
                    caller.done = True
                    changed.notify()

    busy: list[_Caller] = []
    with changed:
        while waiting or busy:
            while waiting and len(busy) < workers:
                caller = _Caller(waiting.popleft(), time.monotonic() + timeout_seconds)
                caller.thread = threading.Thread(target=work, args=(caller,), name=name, daemon=True)
                caller.thread.start()
                busy.append(caller)
            changed.wait(max(min(caller.deadline for caller in busy) - time.monotonic(), 0))
            for caller in busy:
                if not caller.done and caller.deadline <= time.monotonic():
                    caller.done = True
                    caller.thread.name = left_behind
                    results[caller.call] = Called(None, "timeout", f"no answer within {timeout_seconds:g} s")
            busy = [caller for caller in busy if not caller.done]
    return results


def _call(call: Callable[[], Any]) -> Called:
    """What becomes of a call. A SystemExit of the code that is called is an error like any other."""
    try:
        return Called(call(), "ok")
    except BaseException as error:
        return Called(None, "raised", f"{type(error).__name__}: {error}"[:2000])
