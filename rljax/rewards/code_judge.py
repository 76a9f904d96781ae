"""The program that tests a function inside the sandbox: main.py there, beside solution.py, started by
`rljax.rewards.code`.

The solution runs in a child process that never holds the tests: it is forked before they are read, has /dev/null for
stdin, stdout and stderr, and answers calls over a pipe. Values come back as plain types (`encode_value`), so a solution
can neither end the tests early and pass, nor return an object that equals everything, nor change what the tests call.
A list, dict or set that it changes in place is changed for the tests too; what cannot cross is no verdict.
What the solution sends is read by `decode_value` alone: marshal, which must not read what others wrote, goes the other
way. There is no json here: importing it takes longer than starting Python.

stdin: marshalled, setup (source of the prompt's own helpers), test, entry_point and asserts (how many the test has).
stdout: 1 for a test that passed, 0 for one that failed, and a full stop after the last. Exit codes of its own:
COLUMNS_FAIL and NO_VERDICT, with the reason as the end of stderr.
"""

import builtins
import itertools
import marshal
import os
import sys

KINDS = {b"l": list, b"t": tuple, b"u": set, b"z": frozenset}
CONSTANTS = {b"N": None, b"T": True, b"F": False}
CONTAINERS = frozenset({list, tuple, dict, set, frozenset})
PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes}) | CONTAINERS
MAX_BYTES = 2**24  # of a value on the pipe
MAX_ITEMS = 10**5  # of an iterator that a solution returns
COLUMNS_FAIL = 3  # exit code: the prompt's or the tests' own source raises, or tests nothing, whatever the solution is
LEGAL = "None, numbers, texts, bytes, lists, tuples, dicts, sets"
NO_VERDICT = 4  # exit code: no process for the solution, or a value that cannot cross between the two


class CannotCross(Exception):
    """A value that is not to be had in the other process."""


def encode_value(value) -> bytes:
    """The value as a letter, a number or length, a new line, and what it holds; of a subclass, that of its base.

    An iterator is read to its end. Raises CannotCross for other than plain types, ranges and iterators.
    """
    for letter, constant in CONSTANTS.items():
        if value is constant:
            return letter
    if isinstance(value, int):
        return b"i%d\n" % value
    if isinstance(value, float):
        return b"f" + float.hex(value).encode() + b"\n"
    if isinstance(value, complex):
        return b"c" + encode_value(value.real) + encode_value(value.imag)
    if isinstance(value, str | bytes):
        data = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
        return (b"b%d\n" if isinstance(value, bytes) else b"s%d\n") % len(data) + data
    if isinstance(value, dict):
        items = [encode_value(part) for item in value.items() for part in item]
        return b"d%d\n" % len(value) + b"".join(items)
    for letter, kind in KINDS.items():
        if isinstance(value, kind):
            return letter + b"%d\n" % len(value) + b"".join(map(encode_value, value))
    if isinstance(value, range):
        return b"r" + encode_value((value.start, value.stop, value.step))
    if hasattr(type(value), "__next__"):
        items = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(items) <= MAX_ITEMS:
            return b"g" + encode_value(items)
    raise CannotCross(
        f"the solution returns a value of type {type(value).__name__[:100]}; legal: {LEGAL}, ranges, short iterators"
    )


def decode_value(data: bytes, at: int = 0):
    """The value that `encode_value` wrote at this place, of exactly a plain type, and the place after it."""
    letter = data[at : at + 1]
    if letter in CONSTANTS:
        return CONSTANTS[letter], at + 1
    if letter == b"c":
        real, at = decode_value(data, at + 1)
        imaginary, at = decode_value(data, at)
        return complex(real, imaginary), at
    if letter in (b"r", b"g"):
        parts, at = decode_value(data, at + 1)
        return (range(*parts) if letter == b"r" else (part for part in parts)), at
    line = data.index(b"\n", at)
    text = data[at + 1 : line].decode()
    if letter == b"f":
        return float.fromhex(text), line + 1
    number = int(text)
    at = line + 1
    if letter == b"i":
        return number, at
    if letter in (b"s", b"b"):
        found = data[at : at + number]
        return (found if letter == b"b" else found.decode(errors="surrogatepass")), at + number
    parts = []
    for _ in range(2 * number if letter == b"d" else number):
        part, at = decode_value(data, at)
        parts.append(part)
    return (dict(zip(parts[::2], parts[1::2], strict=True)) if letter == b"d" else KINDS[letter](parts)), at


def import_nothing_from_here() -> None:
    """The solution may write to this folder: what stands there must not be imported into the judge."""
    here = os.getcwd()
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != here]


def hide_from_debuggers() -> None:
    """Where there is a /proc, keep other processes of this user from reading this one's memory and files."""
    if os.path.exists("/proc/self/mem"):
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def serve_solution(calls: int, replies: int) -> None:
    """The child: run the solution, then answer calls of its function until the pipe closes."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    with open(calls, "rb") as reader, open(replies, "wb") as writer:
        namespace = {"__name__": "solution"}
        problem = None
        try:
            with open("solution.py", encoding="utf-8") as file:
                exec(compile(file.read(), "solution.py", "exec"), namespace)
        except Exception as error:
            problem = error
        while True:
            name, args, kwargs = marshal.load(reader)  # EOFError, which ends the child, after the last
            reply = call_solution(namespace, problem, name, args, kwargs)
            writer.write(b"%d\n" % len(reply) + reply)
            writer.flush()


def call_solution(namespace: dict, problem: Exception | None, name: str, args: tuple, kwargs: dict) -> bytes:
    """v and the value, or e and the exception, then the arguments where they were changed; or u and why neither."""
    before = marshal.dumps((args, kwargs), 2)
    try:
        try:
            if problem is not None:
                raise problem
            reply = b"v" + encode_value(namespace[name](*args, **kwargs))
        except CannotCross:
            raise
        except Exception as error:
            reply = b"e" + encode_error(error)
        reply += encode_value(None if is_unchanged((args, kwargs), before) else (args, kwargs))
        if len(reply) > MAX_BYTES:
            raise CannotCross(f"the solution returns {len(reply):,} bytes; legal: {MAX_BYTES:,}")
        return reply
    except CannotCross as error:
        return b"u" + encode_value(str(error))


def encode_error(error: Exception) -> bytes:
    """The built-in exception that it is, or that its class is derived from, and its arguments."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        return encode_value((kinds[0], error.args))
    except CannotCross:
        return encode_value((kinds[0], (str(error)[:1000],)))


def is_unchanged(value, before: bytes) -> bool:
    try:
        return marshal.dumps(value, 2) == before
    except ValueError:  # it holds now what marshal does not know
        return False


# --------------------------------------------------------------------------------------------------- the tests' process


def leave_unjudged(reason: str) -> None:
    """End the judge, whatever the tests catch."""
    os.write(2, f"\n{reason}".encode(errors="replace"))
    os._exit(NO_VERDICT)


def first_foreign(values) -> type | None:
    """The type of the first value, at any depth, that would be another one on the other side."""
    kinds = set(map(type, values))
    for kind in kinds - PLAIN:
        return kind
    for value in values if kinds & CONTAINERS else ():
        if type(value) in CONTAINERS:
            parts = [*value, *value.values()] if type(value) is dict else value
            found = first_foreign(parts)
            if found is not None:
                return found
    return None


def encode_call(name: str, args: tuple, kwargs: dict) -> bytes:
    """For the solution's process. Raises CannotCross for other than exactly plain types."""
    try:
        foreign = first_foreign((args, kwargs))
        if foreign is None:
            return marshal.dumps((name, args, kwargs))
        reason = f"an argument of type {foreign.__name__}; legal: {LEGAL}"
    except (ValueError, RecursionError):
        reason = "an argument that is nested too deeply"
    raise CannotCross(f"the tests call {name} with {reason}")


def write_back(arguments: list, changed: list) -> None:
    """Give the lists, dicts and sets among the arguments the content that the solution has left in them."""
    for old, new in zip(arguments, changed, strict=True):
        if isinstance(old, list):
            old[:] = new
        elif isinstance(old, dict | set):
            old.clear()
            old.update(new)
        elif old != new:
            raise CannotCross("the solution changes what stands in a tuple that it is given")


def raise_error(name: str, args: tuple) -> None:
    """The exception of the solution. A StopIteration would end the tests' own loops as if all had passed."""
    kind = getattr(builtins, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    if issubclass(kind, StopIteration | StopAsyncIteration):
        kind = RuntimeError
    try:
        error = kind(*args)
    except Exception:  # UnicodeDecodeError, say, takes five arguments
        error = RuntimeError(*args)
    raise error


def make_candidate(name: str, calls: int, replies: int):
    """The function that the tests call; it asks the child."""
    writer = os.fdopen(calls, "wb")
    reader = os.fdopen(replies, "rb")

    def ask(args: tuple, kwargs: dict) -> tuple[bytes, object]:
        writer.write(encode_call(name, args, kwargs))
        writer.flush()
        line = reader.readline(20)
        size = int(line) if line.strip().isdigit() else 0
        reply = reader.read(size) if 0 < size <= MAX_BYTES else b""
        if not reply:
            raise RuntimeError("the solution has ended")
        letter = reply[:1]
        value, at = decode_value(reply, 1)
        if letter == b"u":
            raise CannotCross(value)
        changed, _ = decode_value(reply, at)
        if changed is not None:
            write_back([*args, *kwargs.values()], [*changed[0], *(changed[1][key] for key in kwargs)])
        return letter, value

    def candidate(*args, **kwargs):
        candidate.was_called = True
        try:
            letter, value = ask(args, kwargs)
        except CannotCross as error:
            leave_unjudged(str(error))
        if letter == b"e":
            raise_error(*value)
        return value

    candidate.__name__ = name
    candidate.was_called = False
    return candidate


def run_tests(task: dict, candidate, report) -> None:
    """Run the tests, which call `count_test` in place of `assert`.

    What the tests raise after they have called the solution is a test that failed. What the sources raise before that
    has nothing to do with it, and is raised. Raises ValueError for tests that never call the solution.
    """
    counted = []

    def count_test(condition) -> None:
        try:
            passed = bool(condition())
        except Exception:
            passed = False
        counted.append(passed)
        report(b"1" if passed else b"0")

    namespace = {"__name__": "tests"}
    exec(compile(task["setup"], "prompt", "exec"), namespace)
    namespace[task["entry_point"]] = candidate
    namespace["count_test"] = count_test
    tests = compile(task["test"], "test", "exec")
    try:
        exec(tests, namespace)
        check = namespace.get("check")
        if check is not None:
            check(candidate)
    except (Exception, SystemExit):
        if not candidate.was_called:
            raise
        report(b"0")
        counted.append(False)
    if not candidate.was_called:
        raise ValueError(f"the tests never call {task['entry_point']}: every solution would pass")
    if not counted and task["asserts"]:
        leave_unjudged("the tests end before their first assert")
    if not counted:  # tests that raise by themselves, and have not
        report(b"1")
    report(b".")


def judge() -> None:
    """Fork the solution, read the tests, run them."""
    sys.set_int_max_str_digits(0)
    import_nothing_from_here()
    hide_from_debuggers()
    calls_read, calls_write = os.pipe()
    replies_read, replies_write = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        leave_unjudged(f"no process for the solution: {error}")
    if child == 0:
        os.close(calls_write)
        os.close(replies_read)
        try:
            serve_solution(calls_read, replies_write)
        finally:
            os._exit(0)
    os.close(calls_read)
    os.close(replies_write)
    task = marshal.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the tests may print
    candidate = make_candidate(task["entry_point"], calls_write, replies_read)
    try:
        run_tests(task, candidate, lambda text: os.write(verdict, text))
    except (Exception, SystemExit):
        sys.__excepthook__(*sys.exc_info())
        sys.exit(COLUMNS_FAIL)


if __name__ == "__main__":
    judge()
