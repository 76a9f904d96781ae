"""Which errors say that another process is gone, so that a launcher starts the run again."""

import jax
import pytest

from rljax.train import distributed
from rljax.train.roll_call import ProcessLostError

GLOO = "UNKNOWN: Gloo AllGather failed: pair.cc:538] Read error [127.0.0.1]:31915: Connection reset by peer"
NCCL = "INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error"
MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (GLOO, True),
        (NCCL, True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        (MEMORY, False),
        ("INVALID_ARGUMENT: Executable expected shape f32[8]", False),
        ("INTERNAL: generated a NaN", False),
    ],
)
def test_what_jax_says_of_lost_processes(monkeypatch, message, lost):
    error = jax.errors.JaxRuntimeError(message)
    assert not distributed.is_lost_process(error)  # alone
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    assert distributed.is_lost_process(error) == lost


def test_refusals_are_not_lost_processes():
    assert not distributed.is_lost_process(ValueError("UNAVAILABLE: a setting"))
    assert not distributed.is_lost_process(RuntimeError("the processes disagree: seed"))
    assert distributed.is_lost_process(ProcessLostError("clock: process 1 did not come (60 seconds)"))
