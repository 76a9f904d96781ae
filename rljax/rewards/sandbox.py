"""Untrusted Python code in a process of its own, shut off as well as the machine allows.

Three levels of isolation; a level that is demanded and not to be had is one error, before anything runs.

| level | network | file system | processes | system calls |
|---|---|---|---|---|
| `namespaces` (Linux) | an empty one | Python, libraries, a private /tmp | its own numbers; all end with it | filtered
|
| `seccomp` (Linux) | no sockets | that of the user | no signals to others; all end with it | filtered |
| `rlimits` | open | that of the user | its group ends with it | all |

At every level: an empty environment, a private folder that is removed, limits of CPU, memory, file size and processes,
a deadline, capped output. SECURITY.md says what each level promises, and what none does.
"""

import atexit
import contextlib
import functools
import marshal
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# The file itself: a virtual environment has only a link to it. The standard library is found from it.
INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
SETUP_SECONDS = 20.0  # beyond a program's own deadline, for the sandbox around it
READ_BYTES = 2**16
REPORT_BYTES = 2000  # of the launcher's line, at most

Level = Literal["namespaces", "seccomp", "rlimits"]


class SandboxError(RuntimeError):
    """The sandbox could not be set up: the program was not run."""


class ResourceLimits(NamedTuple):
    """What a program may use. Memory, CPU time and size of a file are limits of each of its processes."""

    seconds: float = 4.0  # wall clock, from the start of the program to its end
    cpu_seconds: int = 3
    memory_megabytes: int = 512  # address space
    file_megabytes: int = 16  # of one file
    disk_megabytes: int = 64  # of all files together (namespaces)
    processes: int = 16  # at a time, threads included
    output_bytes: int = 2**16  # of stdout that are kept, and as many of stderr


class Isolation(NamedTuple):
    """What is in force around a program."""

    level: Level
    network: str
    filesystem: str
    processes: str
    syscalls: str


class Execution(NamedTuple):
    """What became of a program.

    status: ok (exit code 0), error (another exit code, as after an exception), timeout (a deadline or the limit of CPU
    time was met), killed (a signal ended it).
    """

    status: Literal["ok", "error", "timeout", "killed"]
    stdout: str
    stderr: str
    exit_code: int | None  # None after a timeout; -N: ended by signal N
    seconds: float
    output_cut: bool  # it wrote more than was kept
    isolation: Isolation


ISOLATION: dict[Level, Isolation] = {
    "namespaces": Isolation("namespaces", "none", "read-only Python, private /tmp", "own namespace", "filtered"),
    "seccomp": Isolation("seccomp", "none", "the user's", "no signals to others", "filtered"),
    "rlimits": Isolation("rlimits", "open", "the user's", "own group", "all"),
}
DEFAULT_LIMITS = ResourceLimits()


# ------------------------------------------------------------------------------------------------------------ isolation


@functools.cache
def probe_isolation(level: Level) -> Isolation:
    """What is in force at this level. Tried out once in each process, by a program that does nothing.

    Raises SandboxError, saying which levels are to be had, where it is not available; ValueError for an unknown level.
    """
    if level not in get_args(Level):
        raise ValueError(f"isolation {level!r}; legal: {', '.join(get_args(Level))}")
    reason = _reason_against(level)
    if reason is None:
        return ISOLATION[level]
    available = [other for other in get_args(Level) if _reason_against(other) is None]
    raise SandboxError(
        f"isolation {level!r} is not available here ({reason}); available: {', '.join(available) or 'none'}. "
        "SECURITY.md says what each promises"
    )


@functools.cache
def _reason_against(level: Level) -> str | None:
    """Why a level cannot be had; None where it can."""
    if level != "rlimits" and sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    try:
        found = _run("print('runs')", "", {}, DEFAULT_LIMITS._replace(seconds=30.0, cpu_seconds=30), level)
    except SandboxError as error:
        return str(error)
    if (found.status, found.stdout) != ("ok", "runs\n"):
        user = "; as root it runs as user 65534, who may not reach Python" if os.geteuid() == 0 else ""
        return f"a program that prints one word ended with {found.status}: {found.stderr.strip()[-300:]}{user}"
    return None


# ---------------------------------------------------------------------------------------------------------------- a run


def run_code(
    source: str,
    *,
    stdin: str | bytes = "",
    files: Mapping[str, str | bytes] | None = None,
    limits: ResourceLimits = DEFAULT_LIMITS,
    isolation: Level = "namespaces",
) -> Execution:
    """Run a Python program, the standard library alone on its path, to its end. What it does is never raised here.

    Args:
      source: of the program; it is main.py in its folder.
      files: relative path -> content of what else is in its folder.
      isolation: the level to run at, neither a lower nor a higher one.
    Raises SandboxError where the level is not available or the sandbox could not be set up; ValueError for a path of
    `files` that leads out of the folder, and for limits that are not positive; TypeError for what is no text or bytes.
    """
    files = dict(files or {})
    for name, text in {"source": source, "stdin": stdin, **{f"files: {name!r}": files[name] for name in files}}.items():
        if not isinstance(text, str | bytes):
            raise TypeError(f"{name} is of type {type(text).__name__}; legal: a text or bytes")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.parts in ((), ("main.py",)):
            raise ValueError(f"files: {name!r}; legal: relative paths inside the program's folder, not main.py")
    wrong = [name for name, value in limits._asdict().items() if not value > 0]
    if wrong:
        raise ValueError(f"limits.{wrong[0]} = {getattr(limits, wrong[0])}; legal: above 0")
    probe_isolation(isolation)
    return _run(source, stdin, files, limits, isolation)


def _run(
    source: str, stdin: str | bytes, files: Mapping[str, str | bytes], limits: ResourceLimits, level: Level
) -> Execution:
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        if os.geteuid() == 0:
            os.chmod(folder, 0o755 if level == "namespaces" else 0o777)  # the program is another user
        spec = _specification({"main.py": source, **files}, folder, limits, level)
        data = stdin.encode(errors="replace") if isinstance(stdin, str) else stdin
        report, stdout, stderr = _communicate(spec, data, limits)
    finally:
        _remove(folder)
    return _read_report(report, stdout, stderr, limits, level)


def _specification(files: Mapping[str, str | bytes], folder: str, limits: ResourceLimits, level: Level) -> bytes:
    """What the launcher reads."""
    megabyte = 2**20
    home = "/tmp" if level == "namespaces" else folder
    contents = {name: text.encode(errors="replace") if isinstance(text, str) else text for name, text in files.items()}
    return marshal.dumps(
        {
            "isolation": level,
            "folder": folder,
            "files": contents,
            "arguments": ["main.py"],
            "environment": {
                "PYTHONHASHSEED": "0",
                "PYTHONUTF8": "1",
                "PATH": "/usr/bin:/bin",
                "HOME": home,
                "TMPDIR": home,
            },
            "seconds": limits.seconds,
            "disk_megabytes": limits.disk_megabytes,
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_megabytes * megabyte,
                "RLIMIT_FSIZE": limits.file_megabytes * megabyte,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
            },
        }
    )


class _Server:
    """The process that launches sandboxes for this one (`sandbox_launcher.py`); all of them end with it."""

    def __init__(self):
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [INTERPRETER, "-I", "-S", str(LAUNCHER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
        atexit.register(self.close)

    def send(self, descriptors: list[int]) -> bool:
        """Whether the server is there to take the request; a process that was forked does not ask its parent's."""
        if self.owner != os.getpid():
            return False
        try:
            socket.send_fds(self.socket, [b"1"], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        atexit.unregister(self.close)
        self.socket.close()
        if self.owner == os.getpid() and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


_servers: list[_Server] = []  # that of this process, started when it is first needed
_servers_lock = threading.Lock()


def _send(descriptors: list[int]) -> _Server:
    """Send a request to the server; start one where there is none, or it has ended, or this process is a fork."""
    with _servers_lock:
        if _servers and _servers[0].send(descriptors):
            return _servers[0]
        close_server()
        _servers.append(_Server())
        if not _servers[0].send(descriptors):
            raise SandboxError("the process that launches sandboxes could not be started")
        return _servers[0]


def close_server() -> None:
    """End the process that launches sandboxes, and with it all that run. The next `run_code` starts another one."""
    while _servers:
        _servers.pop().close()


def _communicate(spec: bytes, stdin: bytes, limits: ResourceLimits) -> tuple[str, bytes, bytes]:
    """Have the program launched, feed and read it. Returns the launcher's report and what was kept of the output."""
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        file.write(spec)
        file.seek(0)

        def pipe(reads: bool):
            """Our end, to read from or to write to, and the number of the other."""
            read, write = os.pipe()
            mine, other = (read, write) if reads else (write, read)
            theirs.callback(os.close, other)
            return ours.enter_context(open(mine, "rb" if reads else "wb", buffering=0)), other

        (report, a), (feed, b), (stdout, c), (stderr, d) = pipe(True), pipe(False), pipe(True), pipe(True)
        server = _send([file.fileno(), a, b, c, d])
        theirs.close()
        deadline = time.monotonic() + limits.seconds + SETUP_SECONDS
        kept = _exchange_bytes(report, feed, (stdout, stderr), stdin, limits.output_bytes + 1, deadline)
        if time.monotonic() >= deadline and not kept[0]:
            server.close()  # the launcher, which has a deadline of its own, does not answer
        return kept[0].decode(), bytes(kept[1]), bytes(kept[2])


def _exchange_bytes(report, feed, outputs: tuple, stdin: bytes, most: int, deadline: float) -> list[bytearray]:
    """Write stdin; read all others until the report has come, `most` bytes of each output, and drop the rest."""
    kept = {stream: bytearray() for stream in (report, *outputs)}
    limits = {report: REPORT_BYTES} | dict.fromkeys(outputs, most)
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(feed.fileno(), False)
        selector.register(feed, selectors.EVENT_WRITE)
        while report in selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                if key.fileobj is feed:
                    stdin = _feed(feed, stdin, selector)
                elif not _drain(key.fileobj, kept[key.fileobj], limits[key.fileobj]):
                    selector.unregister(key.fileobj)
    for stream in outputs:
        while len(kept[stream]) < most and _drain(stream, kept[stream], most):  # what is left in the pipe
            pass
    return list(kept.values())


def _feed(stream, data: bytes, selector: selectors.BaseSelector) -> bytes:
    """Write what the pipe takes; close it after the last byte. Returns what is left."""
    try:
        data = data[os.write(stream.fileno(), data[:READ_BYTES]) :] if data else data
    except BlockingIOError:
        return data
    except OSError:  # the program has closed it
        data = b""
    if not data:
        selector.unregister(stream)
        stream.close()
    return data


def _drain(stream, kept: bytearray, most: int) -> bool:
    """Read once; whether there was something."""
    try:
        data = os.read(stream.fileno(), READ_BYTES)
    except OSError:  # nothing there
        return False
    kept += data[: max(most - len(kept), 0)]
    return bool(data)


def _remove(folder: str) -> None:
    """Delete a folder whatever modes a program has given to what is in it, however deep. Links are not followed.

    Folders are moved to a place of ours before they are emptied: no path grows, and a program that is
    still there puts no link into one. What cannot be deleted is left, and nothing raised.
    """
    with contextlib.suppress(OSError):
        place = tempfile.mkdtemp(prefix="sandbox-", dir=os.path.dirname(folder))
        waiting = _move([folder], None, place, 0)
        count = 1
        while waiting:
            path = waiting.pop()
            with contextlib.suppress(OSError):
                found = _empty(path, place, count)
                count += len(found)
                waiting += found
                os.rmdir(path)
        os.rmdir(place)


def _empty(path: str, place: str, count: int) -> list[str]:
    """Delete the files of a folder, and move its folders. Returns where these are now."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with os.scandir(descriptor) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_folder in found:
            if not is_folder:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=descriptor)
        return _move([name for name, is_folder in found if is_folder], descriptor, place, count)
    finally:
        os.close(descriptor)


def _move(names: list[str], inside: int | None, place: str, count: int) -> list[str]:
    """Give each folder a number as its name, and its user all rights to it."""
    moved = []
    for name in names:
        with contextlib.suppress(OSError):
            if os.geteuid() != 0:  # root needs no rights, and must not change those of what a link leads to
                os.chmod(name, 0o700, dir_fd=inside)
            path = os.path.join(place, str(count + len(moved)))
            os.rename(name, path, src_dir_fd=inside)
            moved.append(path)
    return moved


def _read_report(report: str, stdout: bytes, stderr: bytes, limits: ResourceLimits, level: Level) -> Execution:
    kind, _, rest = report.partition(" ")
    if kind not in ("exit", "signal", "timeout"):
        raise SandboxError(rest or "its launcher ended without a word")
    number, seconds = rest.split()
    code = int(number) if kind == "exit" else -int(number)
    status = "ok" if code == 0 else "error"
    if kind == "timeout" or (kind == "signal" and -code == signal.SIGXCPU):
        status, code = "timeout", None
    elif kind == "signal":
        status = "killed"
    return Execution(
        status=status,
        stdout=_text(stdout, limits),
        stderr=_text(stderr, limits),
        exit_code=code,
        seconds=float(seconds),
        output_cut=max(len(stdout), len(stderr)) > limits.output_bytes,
        isolation=ISOLATION[level],
    )


def _text(data: bytes, limits: ResourceLimits) -> str:
    return data[: limits.output_bytes].decode(errors="replace")
