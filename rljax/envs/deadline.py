"""Calls side by side in threads, each with a deadline of its own.

A thread cannot be killed. One that runs past its deadline is left behind, and its answer is dropped; where many such
threads are still busy, the next call is refused. Code that holds the interpreter's lock for long (one regular
expression on hostile text, say) delays every thread: what a model wrote runs in a process of its own.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

MAX_HUNG = 32  # threads of one name that may be busy past their deadline


class Called(NamedTuple):
    """What became of a call. `value` is what it returned where the status is "ok"."""

    value: Any
    status: Literal["ok", "raised", "timeout"]
    detail: str = ""


def call_each(calls: Sequence[Callable[[], Any]], timeout_seconds: float, workers: int, name: str) -> list[Called]:
    """Call each function, `workers` at a time; the results in their order. The deadline begins when a call begins.

    name: what is called, for errors. Raises RuntimeError where `MAX_HUNG` earlier calls of this name still run.
    """
    hung = sum(thread.name == name for thread in threading.enumerate())
    if hung >= MAX_HUNG:
        raise RuntimeError(f"{name}: {hung} calls still run past their deadline of {timeout_seconds:g} s")
    answers: queue.SimpleQueue = queue.SimpleQueue()
    waiting = deque(range(len(calls)))
    deadlines: dict[int, float] = {}
    results: list[Any] = [None] * len(calls)
    while waiting or deadlines:
        while waiting and len(deadlines) < workers:
            i = waiting.popleft()
            deadlines[i] = time.monotonic() + timeout_seconds
            threading.Thread(target=_answer, args=(i, calls[i], answers), name=name, daemon=True).start()
        try:
            i, called = answers.get(timeout=max(min(deadlines.values()) - time.monotonic(), 0))
        except queue.Empty:
            now = time.monotonic()
            for i in [i for i, deadline in deadlines.items() if deadline <= now]:
                del deadlines[i]
                results[i] = Called(None, "timeout", f"no answer within {timeout_seconds:g} s")
        else:
            if deadlines.pop(i, None) is not None:  # else it comes too late
                results[i] = called
    return results


def _answer(i: int, call: Callable[[], Any], answers: queue.SimpleQueue) -> None:
    """Puts (i, what became of the call). A SystemExit of the code that is called is an error like any other."""
    try:
        called = Called(call(), "ok")
    except BaseException as error:
        called = Called(None, "raised", f"{type(error).__name__}: {error}"[:2000])
    answers.put((i, called))
