"""JSON over HTTP to servers that judge completions: a deadline for each request and for all, bounded retries, a cache.

A server that refuses, stalls, sends a byte now and then, breaks off or answers nonsense costs the rows of that request
their judgement, and no more time than `Limits` allows. Proxies of the environment are not used, redirections are not
followed.
"""

import contextlib
import hashlib
import http.client
import json
import math
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_BYTES = 2**24  # of an answer, unless more is expected
FIRST_PAUSE_SECONDS = 0.25  # before the second try of a request; doubled before each further one


class Limits(NamedTuple):
    """How long a server may take, and how much it is asked at a time."""

    timeout_seconds: float = 60.0  # for one request, from connecting to the last byte
    step_timeout_seconds: float = 600.0  # for all requests about one rollout, retries included
    max_concurrent: int = 16  # requests in flight
    retries: int = 2  # further tries of a request that failed


DEFAULT_LIMITS = Limits()


class Reply(NamedTuple):
    """What became of a question. `value` is the answer only if the status is "ok"; the others are `worker.FAILED`."""

    value: Any
    status: str
    detail: str = ""


class RequestError(RuntimeError):
    """A request has no answer. status: "timeout", "unreachable" or "invalid". again: whether another try may help."""

    def __init__(self, status: str, detail: str, again: bool = True):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.again = again


# --------------------------------------------------------------------------------------------------------- one request


def check_url(url: str) -> None:
    """Raises ValueError unless it is http://HOST... or https://HOST..."""
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        legal = False
    if not legal:
        raise ValueError(f"{url!r} is no address of a server; legal: http://HOST:PORT/PATH or https://...")


def check_reachable(url: str, seconds: float = 10.0) -> None:
    """Raises ValueError unless something accepts a connection there."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=seconds).close()
    except OSError as error:
        raise ValueError(f"no server at {url} ({error}); start it first, or correct the address") from None


def request_json(
    url: str,
    body: Any = None,
    seconds: float = 60.0,
    headers: dict[str, str] | None = None,
    most_bytes: int = MAX_BYTES,
) -> Any:
    """The JSON that the server answers to a POST of `body`, or to a GET where that is None.

    Raises RequestError: "timeout" if the last byte has not come after `seconds`; "unreachable" if there is no
    connection, or it broke off; "invalid" for a status other than 200, for what is no JSON, and for more bytes than
    `most_bytes`.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=seconds)
    is_late = threading.Event()
    sockets = []

    def cut() -> None:  # a socket's own timeout is for each read: a byte now and then would never meet it
        is_late.set()
        for connected in sockets:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        sockets.append(connection.sock)  # the response takes it away from the connection
        status, data = _exchange(
            connection, parts.path + (parts.query and f"?{parts.query}"), body, headers or {}, most_bytes
        )
    except (OSError, http.client.HTTPException) as error:
        if is_late.is_set() or isinstance(error, TimeoutError):
            raise RequestError("timeout", f"no answer in {seconds:g} s") from None
        raise RequestError("unreachable", f"{type(error).__name__}: {error}") from None
    finally:
        timer.cancel()
        connection.close()
    if is_late.is_set():
        raise RequestError("timeout", f"no whole answer in {seconds:g} s")
    return _read_answer(status, data, most_bytes)


def _exchange(connection, path: str, body: Any, headers: dict[str, str], most_bytes: int) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json", "Connection": "close"} | headers
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path or "/", data, headers)
    response = connection.getresponse()
    return response.status, response.read(most_bytes + 1)


def _read_answer(status: int, data: bytes, most_bytes: int) -> Any:
    shown = data[:200].decode(errors="replace")
    if status != 200:
        is_temporary = status >= 500 or status in (408, 429)
        raise RequestError("invalid", f"HTTP {status}: {shown}", again=is_temporary)
    if len(data) > most_bytes:
        raise RequestError("invalid", f"an answer of more than {most_bytes} bytes", again=False)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError("invalid", f"the answer is no JSON: {shown!r}") from None


# -------------------------------------------------------------------------------------------------------- many requests


def ask_all(ask: Callable[[Any, float], Any], questions: Sequence[Any], limits: Limits) -> list[Reply]:
    """`ask(question, seconds)` for each question, several at a time; ask raises RequestError where it has no answer.

    Returns after `limits.step_timeout_seconds` at the latest. A question without an answer by then is a "timeout".
    Whatever else `ask` raises is raised here.
    """
    deadline = time.monotonic() + limits.step_timeout_seconds
    replies: list[Reply | None] = [None] * len(questions)
    waiting = deque(range(len(questions)))
    bugs: list[Exception] = []

    def work() -> None:
        while not bugs and time.monotonic() < deadline:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            try:
                replies[number] = _ask_again(ask, questions[number], limits, deadline)
            except Exception as error:  # a bug: not to be lost with the thread
                bugs.append(error)

    # Daemons: a look-up of a host's name cannot be interrupted, and must not keep the program from ending.
    count = min(limits.max_concurrent, len(questions))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if bugs:
        raise bugs[0]
    late = Reply(None, "timeout", f"no answer within the {limits.step_timeout_seconds:g} s of a step")
    return [reply or late for reply in list(replies)]


def _ask_again(ask: Callable[[Any, float], Any], question: Any, limits: Limits, deadline: float) -> Reply:
    """The reply of the first try that has an answer, else that of the last try."""
    pause = FIRST_PAUSE_SECONDS
    for tries_left in range(limits.retries, -1, -1):
        seconds = min(limits.timeout_seconds, deadline - time.monotonic())
        if seconds <= 0:
            return Reply(None, "timeout", f"no answer within the {limits.step_timeout_seconds:g} s of a step")
        try:
            return Reply(ask(question, seconds), "ok")
        except RequestError as error:
            reply = Reply(None, error.status, error.detail)
            if not (tries_left and error.again):
                return reply
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause *= 2
    return reply


def in_background(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Start the call in a thread that does not keep the program from ending.

    The function that is returned waits for the result, and raises what the call raised.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            outcome.put((function(*args), None))
        except Exception as error:
            outcome.put((None, error))

    def result() -> Any:
        value, error = outcome.get()
        if error is not None:
            raise error
        return value

    threading.Thread(target=call, daemon=True).start()
    return result


def finite_number(value: Any) -> float | None:
    """The JSON value as a float; None unless it is a finite number (true and "1" are none)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:
        return None


# ---------------------------------------------------------------------------------------------------------------- cache


class AnswerCache:
    """Answers by the content of their question; with a file they outlive the process.

    A run that is interrupted and resumed computes some steps again. It then gets the answers that it got before, so its
    result is that of an uninterrupted run. For that a failure is kept too, but only for the same draw of the prompt,
    and only once the run went on to another rollout: a run that stopped because its server was down starts afresh.
    """

    def __init__(self, file: str | Path | None = None):
        self._file = None if file is None else Path(file)
        self._known: dict[str, Reply] = {}
        self._failures: dict[str, Reply] = {}  # of the newest rollout
        if self._file is not None and self._file.is_file():
            self._read()

    def fetch(
        self, questions: Sequence[Any], draws: Sequence[int], ask: Callable[[list[Any]], list[Reply]]
    ) -> list[Reply]:
        """A reply to each question, which is JSON; those that are not known come from one call of `ask`.

        Args: draws: for each question, the number of the prompt that it is about.
        """
        self._keep(self._failures)
        self._failures = {}
        keys = [_digest(question) for question in questions]
        of_draw = [_digest([key, int(draw)]) for key, draw in zip(keys, draws, strict=True)]
        found = {k: self._known.get(key) or self._known.get(k) for key, k in zip(keys, of_draw, strict=True)}
        missing = {}
        for number, (key, k) in enumerate(zip(keys, of_draw, strict=True)):
            if found[k] is None:
                missing.setdefault(key, number)
        replies = ask([questions[number] for number in missing.values()]) if missing else []
        answers = dict(zip(missing, replies, strict=True))
        self._keep({key: reply for key, reply in answers.items() if reply.status == "ok"})
        for key, k in zip(keys, of_draw, strict=True):
            if found[k] is None:
                found[k] = answers[key]
                if answers[key].status != "ok":
                    self._failures[k] = answers[key]
        return [found[k] for k in of_draw]

    def _keep(self, replies: dict[str, Reply]) -> None:
        self._known |= replies
        if self._file is None or not replies:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, **reply._asdict()}) + "\n" for key, reply in replies.items()]
        with open(self._file, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _read(self) -> None:
        """Reads the file, and cuts off a last line that was not written to its end."""
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._known[key] = Reply(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{self._file}, line {number}: no answer of a server; delete the line") from None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
