"""The program that tests a function inside the sandbox: main.py there, beside solution.py, started by
`rljax.rewards.code`.

The solution runs in a child process that never holds the tests: it is forked before they are read, has /dev/null for
stdin, stdout and stderr, and answers calls over a pipe. Values cross it as JSON of plain types, so a solution can
neither end the tests early and pass, nor return an object that equals everything, nor change what the tests call.

stdin: JSON with setup (source of the prompt's own helpers), test and entry_point. stdout: 1 for a test that passed, 0
for one that failed, and a full stop after the last.
"""

import builtins
import json
import os
import sys

KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset}
MAX_CHARACTERS = 2**24  # of a value on the pipe


def encode_value(value):
    """The value as JSON: of a subclass, what it holds. Raises TypeError for other than plain types."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode_value(key), encode_value(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [encode_value(item) for item in value]}
    raise TypeError(f"a value of type {type(value).__name__}; legal: plain types")


def decode_value(value):
    """The value that `encode_value` was given, of exactly a plain type."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "dict":
        return {decode_value(key): decode_value(item) for key, item in content}
    if name == "bytes":
        return bytes(content)
    if name == "complex":
        return complex(*content)
    return KINDS[name](decode_value(item) for item in content)


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
    with open(calls, encoding="utf-8") as reader, open(replies, "w", encoding="utf-8") as writer:
        namespace = {"__name__": "solution"}
        problem = None
        try:
            with open("solution.py", encoding="utf-8") as file:
                exec(compile(file.read(), "solution.py", "exec"), namespace)
        except Exception as error:
            problem = error
        for line in reader:
            name, args, kwargs = json.loads(line)
            try:
                if problem is not None:
                    raise problem
                reply = {"value": encode_value(namespace[name](*decode_value(args), **decode_value(kwargs)))}
                text = json.dumps(reply)
            except Exception as error:
                text = json.dumps({"error": [type(error).__name__, str(error)[:1000]]})
            writer.write(text + "\n")
            writer.flush()


def make_candidate(name: str, calls: int, replies: int):
    """The function that the tests call; it asks the child."""
    writer = os.fdopen(calls, "w", encoding="utf-8")
    reader = os.fdopen(replies, encoding="utf-8")

    def candidate(*args, **kwargs):
        writer.write(json.dumps([name, encode_value(list(args)), encode_value(kwargs)]) + "\n")
        writer.flush()
        line = reader.readline(MAX_CHARACTERS)
        reply = json.loads(line) if line.endswith("\n") else {"error": ["RuntimeError", "the solution has ended"]}
        if "error" not in reply:
            return decode_value(reply["value"])
        kind = getattr(builtins, str(reply["error"][0]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        raise kind(reply["error"][1])

    candidate.__name__ = name
    return candidate


def run_tests(task: dict, candidate, report) -> None:
    """Run the tests, which call `count_test` in place of `assert`. Raises what the task's own sources raise."""
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
    exec(compile(task["test"], "test", "exec"), namespace)
    try:
        if "check" in namespace:
            namespace["check"](candidate)
    except Exception:
        report(b"0")
        counted.append(False)
    if not counted:  # tests that raise by themselves, and have not
        report(b"1")
    report(b".")


def judge() -> None:
    """Fork the solution, read the tests, run them."""
    sys.set_int_max_str_digits(0)
    hide_from_debuggers()
    calls_read, calls_write = os.pipe()
    replies_read, replies_write = os.pipe()
    if os.fork() == 0:
        os.close(calls_write)
        os.close(replies_read)
        try:
            serve_solution(calls_read, replies_write)
        finally:
            os._exit(0)
    os.close(calls_read)
    os.close(replies_write)
    task = json.loads(sys.stdin.read())
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the tests may print
    candidate = make_candidate(task["entry_point"], calls_write, replies_read)
    run_tests(task, candidate, lambda text: os.write(verdict, text))


if __name__ == "__main__":
    judge()
