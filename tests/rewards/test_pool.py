"""The pool: whatever a verifier does, `map` answers in time, in order, and can be called again."""

import functools
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from rewards import hostile
from rljax.rewards import pool as pool_module
from rljax.rewards.function_path import pickle_function
from rljax.rewards.pool import Pool
from rljax.rewards.worker import call_verifier

SECONDS = 2.0  # within it any machine lets a worker answer; an endless loop takes all of it
TEXTS = ["", "a", "bb", "ccc"]


def items(*texts, **columns):
    return [((text,), columns) for text in texts]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2, timeout_seconds=30, memory_megabytes=256) as pool:
        yield pool


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def gone(*pids: int, seconds: float = 120.0) -> bool:
    """Waits for their end; so long only where they do not end at all."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_the_order_is_that_of_the_items(pool):
    delays = [((str(i),), {"seconds": 0.05 * (i % 3 == 0)}) for i in range(9)]
    assert [result.value for result in pool.map(hostile.naps, delays)] == [1.0] * 9
    texts = ["x" * i for i in range(50)]
    assert [result.value for result in pool.map(hostile.length, items(*texts))] == list(range(50))
    assert pool.map(hostile.length, []) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers):
    texts = ["a", "bx", "cc", "", "ddd"]
    with Pool(workers=workers, timeout_seconds=SECONDS) as pool:
        results = pool.map(hostile.sometimes_endless, items(*texts))
    assert [(r.value, r.status) for r in results] == [
        *[(1.0, "ok"), (None, "timeout")],
        *[(2.0, "ok"), (0.0, "ok"), (3.0, "ok")],
    ]


def test_an_endless_loop_ends_at_its_deadline(monkeypatch):
    """By how long the pool asks to wait: how long a wait takes, a busy machine decides."""
    asked, really_wait = [], pool_module.wait

    def wait(pipes, seconds):
        asked.append(seconds)
        return really_wait(pipes, seconds)

    with Pool(workers=2, timeout_seconds=SECONDS) as pool:
        pool.map(hostile.sometimes_endless, items("a", "b"))  # started and loaded
        monkeypatch.setattr(pool_module, "wait", wait)
        (result,) = pool.map(hostile.sometimes_endless, items("x"))
        assert result == (None, "timeout", "no answer within 2 s")
        assert 0 < sum(asked) <= 1.1 * SECONDS
        assert [r.value for r in pool.map(hostile.length, items(*TEXTS))] == [0, 1, 2, 3]


def test_starting_and_importing_do_not_count(tmp_path, monkeypatch):
    source = f"import time\ntime.sleep({1.5 * SECONDS})\ndef one(completion): return 1.0\n"
    (tmp_path / "slow_to_import.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from slow_to_import import one

    with Pool(workers=1, timeout_seconds=SECONDS) as pool:
        assert pool.map(one, items("a"))[0] == (1.0, "ok", "")


@pytest.mark.parametrize("verifier", [hostile.bomb, hostile.slow_bomb])
def test_a_memory_bomb_dies_alone(pool, verifier):
    result = pool.map(verifier, items("a"))[0]
    assert result[:2] == (None, "died")
    assert result.detail == "out of memory"
    assert pool.map(hostile.length, items("ab"))[0].value == 2


@pytest.mark.parametrize(("verifier", "detail"), [(hostile.exits, "exit code 3"), (hostile.segfault, "signal SIGSEGV")])
def test_a_worker_that_ends_is_replaced(pool, verifier, detail):
    assert pool.map(verifier, items("a", "b", "c")) == [(None, "died", detail)] * 3
    assert pool.map(hostile.length, items("ab"))[0].value == 2


def test_an_idle_worker_that_was_killed_blames_no_item(pool):
    for result in pool.map(hostile.own_number, items("a", "b")):
        os.kill(int(result.value), 9)
        assert gone(int(result.value))
    assert [r.value for r in pool.map(hostile.length, items(*TEXTS))] == [0, 1, 2, 3]


def test_workers_are_recycled():
    with Pool(workers=1, max_calls=3) as pool:
        numbers = [r.value for r in pool.map(hostile.own_number, items(*"abcdefg"))]
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]
    assert len(set(numbers)) == 3
    assert gone(*map(int, numbers))


def test_the_whole_group_is_killed_and_close_leaves_nothing(tmp_path):
    with Pool(workers=1, timeout_seconds=SECONDS) as pool:
        assert pool.map(hostile.endless_with_a_child, items("a", path=str(tmp_path / "pids")))[0].status == "timeout"
        assert gone(*map(int, (tmp_path / "pids").read_text().split()))
        idle = int(pool.map(hostile.own_number, items("a"))[0].value)
        assert alive(idle)
    assert gone(idle)


@pytest.mark.parametrize("how", ["high", "low", "datagram", "name"])
def test_no_network(pool, how):
    with socket.create_server(("127.0.0.1", 0)) as server:
        columns = {"port": server.getsockname()[1], "how": how}
        assert call_verifier(hostile.calls_home, ("a",), columns).value == 1.0
        assert pool.map(hostile.calls_home, items("a", **columns))[0] == (0.0, "ok", "")


def test_local_pairs_stay_legal(pool):
    assert pool.map(hostile.local_pair, items("a"))[0].value == 1


def test_a_worker_is_light_and_takes_no_accelerator(pool):
    for module in ("jax", "numpy"):
        assert pool.map(hostile.knows, items("a", module=module))[0].value == 0.0
    assert pool.map(hostile.environment, items("a", name="JAX_PLATFORMS"))[0].value == 1.0
    heavy = "{'jax', 'numpy', 'flax'} & set(sys.modules)"
    script = f"import sys, rljax.rewards.worker, rljax.rewards.pool; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("what", "value"),
    [(True, 1.0), (2, 2.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.int64(-3), -3.0), (np.array(1.5), 1.5)],
)
def test_legal_answers(pool, what, value):
    for result in (
        call_verifier(hostile.says, ("a",), {"what": what}),
        pool.map(hostile.says, items("a", what=what))[0],
    ):
        assert result == (value, "ok", "")
    assert pool.map(hostile.nothing, items("a"))[0] == (None, "none", "")


@pytest.mark.parametrize(
    "what", ["1.0", float("nan"), float("inf"), 1e39, 10**400, 1j, [1.0], np.array([1.0]), np.complex64(1)]
)
def test_other_answers_are_errors_here_and_there(pool, what):
    here, there = call_verifier(hostile.says, ("a",), {"what": what}), pool.map(hostile.says, items("a", what=what))[0]
    assert here == there
    assert here[:2] == (None, "error")
    assert type(what).__name__ in here.detail


@pytest.mark.parametrize(("verifier", "word"), [(hostile.raises, "no such rubric"), (hostile.leaves, "SystemExit")])
def test_what_is_raised_is_told_with_its_line(pool, verifier, word):
    here, there = call_verifier(verifier, ("a",), {}), pool.map(verifier, items("a"))[0]
    assert here == there
    assert here.status == "error"
    assert word in here.detail
    assert "hostile.py" in here.detail


def test_a_function_that_cannot_travel_is_told_what_is_legal(pool):
    def inner(completion):
        return 1.0

    for function in (lambda completion: 1.0, inner, "abc".count, functools.partial(inner)):
        with pytest.raises(ValueError, match=r"top level of a file(.|\n)*pool=None"):
            pool.map(function, items("a"))
    with pytest.raises(ValueError, match="bound by partial"):
        pickle_function(functools.partial(hostile.says, what=lambda: 0))


def test_partials_travel_and_odd_arguments_are_named(pool):
    assert pool.map(functools.partial(hostile.says, what=0.25), items("a"))[0].value == 0.25
    with pytest.raises(Exception, match="pickle") as caught:
        pool.map(hostile.length, [((lambda: 0,), {})])
    assert "Pool.map" in caught.value.__notes__[0]
    assert pool.map(hostile.length, items("ab"))[0].value == 2


@pytest.mark.parametrize(("source", "word"), [("raise ImportError('no sympy')", "no sympy"), ("os._exit(4)", "code 4")])
def test_a_module_that_does_not_load_is_one_error(tmp_path, monkeypatch, source, word):
    name = f"broken_{len(word)}"
    source = f"import os\nif 'rljax.rewards.pool' not in __import__('sys').modules: {source}\ndef f(c): return 1\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(workers=2) as pool, pytest.raises(RuntimeError, match=rf"could not load {name}:f(.|\n)*{word}"):
        pool.map(__import__(name).f, items("a", "b"))


SCRIPT = """
    import functools, os, sys
    from rljax.rewards.pool import Pool

    def verdict(completion, weight=1.0):
        return weight * len(completion)

    def stuck(completion):
        open(completion + str(os.getpid()), "w").close()
        while True:
            pass

    if __name__ == "__main__":
        with Pool(workers=2, timeout_seconds=600) as pool:
            print(pool.map(functools.partial(verdict, weight=0.5), [(("ab",), {}), (("abcd",), {})]), flush=True)
            if len(sys.argv) > 1:
                pool.map(stuck, [((sys.argv[1] + "/",), {})] * 2)
    else:
        assert "rljax.rewards.pool" in sys.modules
"""


def test_functions_of_a_script_travel(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert "value=1.0" in done.stdout, done.stderr
    assert "value=2.0" in done.stdout
    typed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, cwd=tmp_path
    )
    assert "top level of a file" in typed.stderr


def test_a_script_that_trains_wherever_it_is_imported_is_told_of_the_guard(tmp_path):
    script = tmp_path / "script.py"
    unguarded = textwrap.dedent(SCRIPT).replace('if __name__ == "__main__":', "if True:")
    script.write_text(unguarded)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert 'legal: what the script runs stands under if __name__ == "__main__":' in done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a busy process with its parent")
def test_busy_workers_end_with_a_parent_that_was_killed(tmp_path):
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    script.write_text(textwrap.dedent(SCRIPT))
    marks.mkdir()
    with subprocess.Popen([sys.executable, script, marks], stdout=subprocess.DEVNULL) as parent:
        while len(list(marks.iterdir())) < 2 and parent.poll() is None:
            time.sleep(0.02)
        parent.kill()
    pids = [int(mark.name) for mark in marks.iterdir()]
    assert len(pids) == 2
    assert gone(*pids)


def test_functions_are_called_side_by_side(tmp_path):
    """Each waits until the other was called: one after another, both would run into the deadline."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    work = [
        (hostile.waits_for, items(*"abcd", mine=one, other=two)),  # four: they do not take both workers
        (functools.partial(hostile.waits_for, mine=two), items("b", other=one)),
    ]
    with Pool(workers=2, timeout_seconds=60) as pool:
        assert pool.map_each(work) == [[(1.0, "ok", "")] * 4, [(1.0, "ok", "")]]


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 3))])
def test_side_by_side_the_results_are_those_of_one_after_another(workers):
    work = [
        (hostile.length, items(*TEXTS)),
        (hostile.nothing, []),
        (hostile.sometimes_endless, items("x", "a", "bb")),
        (hostile.exits, items("a")),
        (hostile.length, items("dddd")),
    ]
    with Pool(workers=workers, timeout_seconds=SECONDS) as pool:
        together = pool.map_each(work)
        assert together == [pool.map(function, calls) for function, calls in work]
    assert [[result.value for result in results] for results in together] == [
        [0, 1, 2, 3],
        [],
        [None, 1, 2],
        [None],
        [4],
    ]
    assert pool.map_each([]) == []


def test_impossible_pools_are_refused():
    with pytest.raises(ValueError, match="workers=0"):
        Pool(workers=0)
