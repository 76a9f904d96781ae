"""The program that tests a function inside the sandbox: main.py there, beside solution.py, started by
`rljax.rewards.code`.

The solution runs in a child process that never holds the tests: it is forked before they are read, has /dev/null for
stdin, stdout and stderr, and answers calls over a pipe. Values come back as plain types (`encode_value`), so a solution
can neither end the tests early and pass, nor return an object that equals everything, nor change what the tests call.
What the solution sends is read by `decode_value` alone: marshal, which must not read what others wrote, goes the other
way. There is no json here: importing it takes longer than starting Python.

stdin: marshalled, setup (source of the prompt's own helpers), test and entry_point. stdout: 1 for a test that passed, 0
for one that failed, and a full stop after the last. Exit codes of its own: COLUMNS_FAIL and NO_PROCESS.
"""

import builtins
import marshal
import os
import sys

KINDS = {b"l": list, b"t": tuple, b"u": set, b"z": frozenset}
CONSTANTS = {b"N": None, b"T": True, b"F": False}
MAX_BYTES = 2**24  # of a value on the pipe
COLUMNS_FAIL = 3  # exit code: the prompt's or the tests' own source raises, whatever the solution is
NO_PROCESS = 4  # exit code: there was no process to be had for the solution


def encode_value(value) -> bytes:
    """The value as a letter, a number or length, a new line, and what it holds; of a subclass, that of its base.

    Raises TypeError for other than plain types.
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
    raise TypeError(f"a value of type {type(value).__name__}; legal: plain types")


def decode_value(data: bytes, at: int = 0):
    """The value that `encode_value` wrote at this place, of exactly a plain type, and the place after it."""
    letter = data[at : at + 1]
    if letter in CONSTANTS:
        return CONSTANTS[letter], at + 1
    if letter == b"c":
        real, at = decode_value(data, at + 1)
        imaginary, at = decode_value(data, at)
        return complex(real, imaginary), at
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
            try:
                if problem is not None:
                    raise problem
                reply = b"v" + encode_value(namespace[name](*args, **kwargs))
            except Exception as error:
                reply = b"e" + encode_value((type(error).__name__, str(error)[:1000]))
            writer.write(b"%d\n" % len(reply) + reply)
            writer.flush()


def make_candidate(name: str, calls: int, replies: int):
    """The function that the tests call; it asks the child."""
    writer = os.fdopen(calls, "wb")
    reader = os.fdopen(replies, "rb")

    def candidate(*args, **kwargs):
        candidate.was_called = True
        marshal.dump((name, args, kwargs), writer)
        writer.flush()
        line = reader.readline(20)
        size = int(line) if line.strip().isdigit() else 0
        reply = reader.read(size) if 0 < size <= MAX_BYTES else b""
        if not reply:
            raise RuntimeError("the solution has ended")
        value, _ = decode_value(reply, 1)
        if reply[:1] == b"v":
            return value
        kind = getattr(builtins, str(value[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(value[1])

    candidate.__name__ = name
    candidate.was_called = False
    return candidate


def run_tests(task: dict, candidate, report) -> None:
    """Run the tests, which call `count_test` in place of `assert`.

    What the tests raise after they have called the solution is a test that failed. What the sources raise before that
    has nothing to do with it, and is raised.
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
    check = None
    try:
        exec(tests, namespace)
        check = namespace.get("check")
        if check is not None:
            check(candidate)
    except (Exception, SystemExit):
        if check is None and not candidate.was_called:
            raise
        report(b"0")
        counted.append(False)
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
        sys.stderr.write(f"no process for the solution: {error}")
        sys.exit(NO_PROCESS)
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
