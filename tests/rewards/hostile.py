"""Verifiers that travel to the pool's workers, most of them meaning harm. Imports nothing heavy: workers load it."""

import _socket
import ctypes
import os
import socket
import subprocess
import sys
import time


def length(completion):
    return len(completion)


def nothing(completion):
    return None


def naps(completion, seconds=0.0):
    time.sleep(seconds)
    return 1.0


def endless(completion):
    while True:
        pass


def sometimes_endless(completion):
    return endless(completion) if "x" in completion else len(completion)


def endless_with_a_child(completion, path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    return endless(completion)


def bomb(completion):
    return len(bytearray(2**31))


def slow_bomb(completion):
    parts = []
    while True:
        parts.append("x" * 2**24)


def exits(completion):
    os._exit(3)


def leaves(completion):
    sys.exit(0)


def segfault(completion):
    ctypes.string_at(0)


def dies_on_three(completion):
    return os._exit(1) if completion == "3" else 0.5


def only_twelve(completion, answer):
    """Applies where the answer has two digits."""
    return float(completion == answer) if len(answer) == 2 else None


def raises(completion):
    raise KeyError("no such rubric")


def says(completion, what):
    return what


def calls_home(completion, port, how):
    """1.0 if that part of a connection to the port could be had, 0.0 if the worker refused."""
    try:
        if how == "high":
            socket.create_connection(("127.0.0.1", port)).close()
        elif how == "low":
            _socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
        elif how == "datagram":
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        else:
            socket.getaddrinfo("localhost", port)
    except PermissionError:
        return 0.0
    return 1.0


def local_pair(completion):
    left, right = socket.socketpair()
    with left, right:
        left.send(b"x")
        return len(right.recv(1))


def own_number(completion):
    return os.getpid()


def knows(completion, module):
    return module in sys.modules


def environment(completion, name):
    return float(os.environ.get(name) == "cpu")


def share_of(completion, letters):
    """Share of the completion that is one of the dataset's letters."""
    return sum(c in letters for c in completion) / max(len(completion), 1)


def waits_for(completion, mine, other):
    """Says that it was called by the file `mine`, and waits until the other one was, by the file `other`."""
    with open(mine, "w"):
        pass
    while not os.path.exists(other):
        time.sleep(0.01)
    return 1.0
