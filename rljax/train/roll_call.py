"""Whether all processes of a run are there, told to each before JAX is to join them.

JAX's own initialization ends the process where one does not come, and says neither which nor why.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple


class Cluster(NamedTuple):
    """Which of the processes of a run this one is."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int


class ProcessLostError(RuntimeError):
    """Another process is gone, or did not come in time: worth a new start."""


class RollCall(NamedTuple):
    """What process 0 says to every other process once it has heard them."""

    problem: str  # "": they are all there
    is_lost: bool = False  # one did not come, or not yet: a new start may find it


def call_the_roll(cluster: Cluster, deadline_seconds: float) -> None:
    """Wait until every process is there. Raises ProcessLostError on all that are, naming those that are not, and
    RuntimeError where they were numbered wrongly.

    Process 0 listens on the port that JAX's coordinator is going to have.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.process == 0:
        roll = _hear_the_others(int(port), cluster.processes, deadline_seconds)
    else:
        roll = _report_to_main(host.strip("[]"), int(port), cluster, deadline_seconds)
    if roll.problem:
        raise (ProcessLostError if roll.is_lost else RuntimeError)(roll.problem)


def _hear_the_others(port: int, processes: int, deadline_seconds: float) -> RollCall:
    """Process 0: hear every other process, and tell each the same."""
    try:
        server = _listen(port)
    except OSError as error:
        problem = f"process 0 cannot listen on port {port} ({error.strerror}); legal: a coordinator with a free port"
        return RollCall(problem, error.errno == errno.EADDRINUSE)  # perhaps by the run before, which is about to end
    deadline = time.monotonic() + deadline_seconds
    present: dict[int, socket.socket] = {}
    roll = RollCall("")
    with server, contextlib.ExitStack() as connections:
        while len(present) < processes - 1 and not roll.problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, processes)) - present.keys())
                late = f"{processes_in_words(missing)} of {processes} did not come within {deadline_seconds:g} seconds"
                roll = RollCall(late, is_lost=True)
                break
            roll = RollCall(_note_arrival(connection, present, processes))
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(roll._asdict()).encode() + b"\n")
                connection.settimeout(5.0)
                connection.recv(1)  # until it has read that and closed: the port is then free at once
    return roll


def _note_arrival(connection: socket.socket, present: dict[int, socket.socket], processes: int) -> str:
    """Adds the process at the other end to `present`. Returns what is wrong with it."""
    connection.settimeout(5.0)
    try:
        hello = json.loads(connection.makefile().readline())
        process, count = int(hello["process"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError):  # somebody else who looks at open ports
        return ""
    twice = process in present
    present[-len(present) - 1 if twice else process] = connection
    if count != processes:
        return f"process {process} was told of {count} processes, process 0 of {processes}; legal: the same number"
    if twice or not 0 < process < processes:
        return f"two processes say that they are number {process} of {processes}; legal: a number of its own for each"
    return ""


def _report_to_main(host: str, port: int, cluster: Cluster, deadline_seconds: float) -> RollCall:
    """Any other process: report to process 0 and wait for what it says of all."""
    deadline = time.monotonic() + deadline_seconds
    hello = json.dumps({"process": cluster.process, "processes": cluster.processes}).encode() + b"\n"
    heard = b""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5.0) as connection:
            connection.sendall(hello)
            connection.settimeout(deadline_seconds + 10.0)  # process 0 may have begun to wait only now
            heard = _read_line(connection) or heard
            with contextlib.suppress(ValueError, TypeError):  # not of process 0
                return RollCall(**json.loads(heard))
        time.sleep(0.1)
    if heard:
        other = f"at {cluster.coordinator} another program answers, with {heard[:24]!r}"
        return RollCall(f"{other}: a run that is not over yet? Legal: a coordinator with a free port", is_lost=True)
    silent = f"process 0 at {cluster.coordinator} did not answer within {deadline_seconds:g} seconds"
    return RollCall(silent, is_lost=True)


def _read_line(connection: socket.socket) -> bytes:
    """A line of JSON; of anything else what comes first: it may have no lines."""
    line = connection.recv(4096)
    return line if line.endswith(b"\n") or not line.startswith(b"{") else line + connection.makefile("rb").readline()


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def processes_in_words(numbers: Sequence[int]) -> str:
    """process 3; processes 1, 2."""
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
