"""The sandbox keeps what SECURITY.md promises: each promise is attacked, at each level that gives it."""

import ctypes
import errno
import getpass
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rewards import attacks
from rljax.rewards import sandbox
from rljax.rewards.sandbox import ResourceLimits, SandboxError, probe_isolation, run_code

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("namespaces", "seccomp", "rlimits")
PATIENT = ResourceLimits(seconds=60.0, cpu_seconds=60)  # nothing here takes long, but a machine may be busy
SHORT = ResourceLimits(seconds=0.7)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """As root, programs of the lower levels run as `nobody`, who may not reach Python in root's own folder."""
    system = Path("/usr/bin/python3")
    with pytest.MonkeyPatch.context() as patch:
        if os.geteuid() == 0 and sandbox.INTERPRETER.startswith("/root/") and system.exists():
            patch.setattr(sandbox, "INTERPRETER", str(system.resolve()))
            start_afresh()
        yield
    start_afresh()


def start_afresh():
    sandbox.close_server()
    sandbox.probe_isolation.cache_clear()
    sandbox._reason_against.cache_clear()


def run(source: str, level: str = "namespaces", **arguments):
    try:
        probe_isolation(level)
    except SandboxError as error:
        pytest.skip(str(error))
    return run_code(source, isolation=level, **{"limits": PATIENT} | arguments)


def processes_with(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if mark.encode() in command and state not in "ZX":
            found.append(folder.name)
    return found


def gone(mark: str, seconds: float = 60.0) -> bool:
    """Waits for their end; so long only where they do not end at all."""
    end = time.monotonic() + seconds
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.02)
    return not processes_with(mark)


# ----------------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_runs(level):
    source = "import sys, helper\nprint(helper.f(input()))\nprint('note', file=sys.stderr)\nsys.exit(3)"
    found = run(source, level, stdin="21", files={"helper.py": "def f(x):\n    return 2 * int(x)", "d/x.bin": b"\xff"})
    assert found[:4] == ("error", "42\n", "note\n", 3)
    assert found.isolation == sandbox.ISOLATION[level]
    assert not found.output_cut


@pytest.mark.parametrize(
    ("source", "status", "exit_code"),
    [
        ("print(1)", "ok", 0),
        ("1/0", "error", 1),
        ("import os; os.abort()", "killed", -signal.SIGABRT),
        ("import os; os.kill(os.getpid(), 9)", "killed", -signal.SIGKILL),
    ],
)
def test_how_it_ended(source, status, exit_code):
    found = run(source)
    assert (found.status, found.exit_code) == (status, exit_code)


def test_output_that_is_no_text():
    assert run("import sys; sys.stdout.buffer.write(b'a\\xff\\x00b')").stdout == "a\N{REPLACEMENT CHARACTER}\x00b"


def test_arguments_that_are_refused():
    for name in ("../x", "/etc/x", "", "main.py", "a/../../b"):
        with pytest.raises(ValueError, match="legal: relative paths inside"):
            run_code("", files={name: ""})
    with pytest.raises(ValueError, match=re.escape("limits.processes = 0; legal: above 0")):
        run_code("", limits=ResourceLimits(processes=0))
    for wrong in (123, None, ["print(1)"], {"a": 1}, True):
        with pytest.raises(TypeError, match=f"^source is of type {type(wrong).__name__}; legal: a text or bytes"):
            run_code(wrong)
    with pytest.raises(TypeError, match=r"^files: 'a' is of type int; legal: a text or bytes$"):
        run_code("", files={"a": 1})
    with pytest.raises(ValueError, match="isolation 'docker'; legal: namespaces, seccomp, rlimits"):
        run_code("", isolation="docker")


def test_a_level_that_is_not_to_be_had_starts_nothing(monkeypatch):
    reasons = {"namespaces": "the kernel says no", "seccomp": None, "rlimits": None}
    monkeypatch.setattr(sandbox, "_reason_against", reasons.get)
    sandbox.probe_isolation.cache_clear()
    monkeypatch.setattr(sandbox, "_communicate", None)
    with pytest.raises(
        SandboxError, match=r"'namespaces' is not available here \(the kernel says no\); available: secc"
    ):
        run_code("print(1)")


def test_a_launcher_that_fails_is_an_error_and_no_verdict(monkeypatch, tmp_path):
    run("print(1)")
    broken = tmp_path / "launcher.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(sandbox, "LAUNCHER", broken)
    sandbox.close_server()
    with pytest.raises(SandboxError, match=r"ended without a word|could not be started"):
        run_code("print(1)")
    monkeypatch.undo()
    assert run("print(1)").status == "ok"  # another one is started


# ---------------------------------------------------------------------------------------------------------- attacks


ORDINARY = 1234  # a user without privileges
ATTEMPTS = 41
AS_ORDINARY_USER = """
import importlib.util, subprocess, sys
arguments, source = sys.argv[1:]
spec = importlib.util.spec_from_file_location("sandbox", arguments.split()[0])
sandbox = importlib.util.module_from_spec(spec)
sys.modules["sandbox"] = sandbox
spec.loader.exec_module(sandbox)
target = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], env={"KEY": "secret"})
try:
    limits = sandbox.ResourceLimits(seconds=60.0, cpu_seconds=60)
    stdin = " ".join([*arguments.split()[1:], str(target.pid)])
    print(sandbox.run_code(source, stdin=stdin, limits=limits, isolation="seccomp").stdout, target.poll())
finally:
    target.kill()
    target.wait()
"""


def survey(level: str, folder: Path) -> tuple[dict[str, str], str]:
    """attempt -> its outcome, and what is then in the file that was to be overwritten."""
    secret = folder / "secret"
    secret.write_text("secret-of-a-file")
    outside = folder / "outside"
    outside.write_text("as it was")
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = run(attacks.SURVEY, level, stdin=f"{secret} {outside} {server.getsockname()[1]} {os.getpid()}")
    assert found.status == "ok", found.stderr
    return read_survey(found.stdout.splitlines()), outside.read_text()


def read_survey(lines: list[str]) -> dict[str, str]:
    outcomes = dict(line.split(" ", 1) for line in lines)
    assert outcomes.pop("still") == "alive"
    assert outcomes.pop("environment") == ENVIRONMENT
    assert len(outcomes) == ATTEMPTS
    return outcomes


def got_in(outcomes: dict[str, str]) -> dict[str, str]:
    return {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("refused")}


ENVIRONMENT = str(sorted(["HOME", "LC_CTYPE", "PATH", "PYTHONHASHSEED", "PYTHONUTF8", "TMPDIR"]))
BY_NUMBER = pytest.mark.skipif(os.uname().machine != "x86_64", reason="it makes system calls by their x86_64 numbers")
OF_THE_USER = {"read", "link", "hard_link", "write", "link_to_write", "library", "root", "proc"}  # the page says so


@BY_NUMBER
def test_nothing_is_to_be_had_in_namespaces(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-of-the-environment")
    outcomes, outside = survey("namespaces", tmp_path)
    assert outside == "as it was"
    assert got_in(outcomes) in ({}, {"kill_parent": "got None"})  # a signal to process 1 of the namespace is dropped


@BY_NUMBER
def test_no_network_no_signals_and_no_privileges_with_seccomp(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-of-the-environment")
    outcomes, _ = survey("seccomp", tmp_path)
    assert got_in(outcomes).keys() <= OF_THE_USER


@BY_NUMBER
@pytest.mark.skipif(os.geteuid() != 0, reason="the test above is of an ordinary user")
def test_no_signals_to_others_of_the_same_ordinary_user(tmp_path):
    """As root, programs are `nobody`, to whom the kernel refuses much that the sandbox has to."""
    probe = run("print(1)", "seccomp")
    assert probe.status == "ok"
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011) if folder.owner() == getpass.getuser() else None
    module = tmp_path / "sandbox.py"
    for name in ("sandbox.py", "sandbox_launcher.py"):
        (tmp_path / name).write_bytes((ROOT / "rljax" / "rewards" / name).read_bytes())
    for name in ("secret", "outside"):
        (tmp_path / name).write_text("text")
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = f"{module} {tmp_path}/secret {tmp_path}/outside {server.getsockname()[1]}"
        done = subprocess.run(
            [sandbox.INTERPRETER, "-c", AS_ORDINARY_USER, arguments, attacks.SURVEY],
            user=ORDINARY,
            group=ORDINARY,
            extra_groups=[],
            env={},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
    *lines, target = done.stdout.splitlines()
    assert target.strip() == "None", done.stderr  # it is alive
    assert got_in(read_survey(lines)).keys() <= OF_THE_USER


@pytest.mark.parametrize("level", LEVELS[:2])
def test_no_memory_queue_or_semaphore_of_others_is_open_by_its_number(level):
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = libc.shmget(0, 64, 0o1666), libc.msgget(0, 0o1666), libc.semget(0, 1, 0o1666)  # for everybody
    try:
        assert min(numbers) >= 0
        outcomes = run(attacks.SYSTEM_V, level, stdin=" ".join(map(str, numbers))).stdout.split()
    finally:
        libc.shmctl(numbers[0], 0, None)
        libc.msgctl(numbers[1], 0, None)
        libc.semctl(numbers[2], 0, 0)
    assert len(outcomes) == 2 * 13
    assert set(outcomes[1::2]) == {str(errno.EPERM)}, outcomes


def test_neither_the_machines_name_nor_installed_packages_are_seen():
    source = """
import glob, os, sys
places = [f"{folder}/{kind}" for folder in {*sys.path, "/usr/lib/python3", "/usr/local/lib/python3"} for kind in
          ("site-packages", "dist-packages")]
print(os.uname().nodename, sum((glob.glob(place + "/*") for place in places), []))
"""
    assert run(source).stdout == "sandbox []\n"


def test_the_environment_is_empty_at_the_lowest_level(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    found = run("import os; print(sorted(os.environ))", "rlimits")
    assert found.stdout.strip() == ENVIRONMENT


@pytest.mark.parametrize("level", LEVELS[:2])
@pytest.mark.parametrize("how", ["end", "stay"])
def test_nothing_survives(level, how):
    mark = f"survivor-{os.getpid()}-{level}-{how}"
    limits = PATIENT if how == "end" else PATIENT._replace(seconds=2.0)
    found = run(attacks.SURVIVORS, level, stdin=f"{mark} {how}", limits=limits)
    assert found.status == ("ok" if how == "end" else "timeout")
    assert gone(mark)


def test_the_group_ends_at_the_lowest_level():
    mark = f"group-{os.getpid()}"
    source = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', input()])"
    assert run(source, "rlimits", stdin=mark).status == "ok"
    assert gone(mark)


@pytest.mark.parametrize("level", LEVELS[:2])
def test_a_fork_bomb_ends_at_its_deadline(level):
    assert run(attacks.FORK_BOMB, level, limits=SHORT).status == "timeout"
    assert run("print(1)", level).status == "ok"


def test_the_sandbox_ends_with_the_process_that_started_it():
    run("print(1)")
    mark = f"orphan-{os.getpid()}"
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from rljax.rewards import sandbox
        sandbox.INTERPRETER = {sandbox.INTERPRETER!r}
        sleep = [sandbox.INTERPRETER, "-c", "import time; time.sleep(600)", {mark!r}]
        source = f"import os; os.execv({{sleep[0]!r}}, {{sleep}})"
        sandbox.run_code(source, limits=sandbox.ResourceLimits(seconds=600.0))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        end = time.monotonic() + 60
        while len(processes_with(mark)) < 2 and time.monotonic() < end:  # the script itself names it, too
            time.sleep(0.02)
        assert len(processes_with(mark)) == 2
    finally:
        process.kill()
        process.wait()
    assert gone(mark)


@pytest.mark.parametrize(
    "source",
    [
        "import time; time.sleep(600)",
        "while True: pass",
        "import signal, time\nfor n in range(1, 64):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(600)",
        "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
        "import threading\nthreading.Event().wait()",
    ],
    ids=["sleep", "loop", "ignores signals", "prints", "waits"],
)
def test_a_program_that_does_not_end(source):
    found = run(source, limits=SHORT)
    assert (found.status, found.exit_code) == ("timeout", None)


def test_cpu_time_is_limited_apart_from_the_clock():
    assert run("while True: pass", limits=PATIENT._replace(cpu_seconds=1)).status == "timeout"


def test_memory_is_limited():
    found = run("x = bytearray(2**30)")
    assert found.status == "error"
    assert "MemoryError" in found.stderr


def test_ten_megabytes_of_output_are_cut():
    limits = PATIENT._replace(output_bytes=1000)
    found = run("import sys\nprint('x' * 10**7)\nprint('y' * 10**7, file=sys.stderr)", limits=limits)
    assert (found.status, found.stdout, found.stderr) == ("ok", "x" * 1000, "y" * 1000)
    assert found.output_cut


def test_a_single_byte_of_output():
    found = run("print('two')", limits=PATIENT._replace(output_bytes=1))
    assert (found.status, found.stdout, found.output_cut) == ("ok", "t", True)


def test_disk_is_limited():
    one = "open('big', 'wb').write(bytes(2**25))"
    assert "File too large" in run(one).stderr
    many = "for i in range(100): open(str(i), 'wb').write(bytes(2**20))"
    assert "No space left" in run(many, limits=PATIENT._replace(disk_megabytes=8)).stderr


def test_stdin_that_is_not_read_and_more_than_there_is():
    assert run("print('done')", stdin="x" * 10**7).stdout == "done\n"
    assert (
        run("import sys; print(len(sys.stdin.read()), sys.stdin.read() == '')", stdin="x" * 10**6).stdout
        == "1000000 True\n"
    )
    assert run("input()").stderr.endswith("EOFError: EOF when reading a line\n")


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_cannot_report_its_own_end(level):
    found = run(attacks.FORGERY, level)
    assert (found.status, found.exit_code) == ("error", 7)


@pytest.mark.parametrize("level", LEVELS)
def test_the_folder_is_removed_whatever_is_in_it(level, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    for folder in (tmp_path, *tmp_path.parents[:3]):  # as root, `nobody` has to reach it
        folder.chmod(folder.stat().st_mode | 0o011) if folder.owner() == getpass.getuser() else None
    found = run(attacks.LEFTOVERS, level)
    assert found.status == "ok", found.stderr
    assert list(tmp_path.iterdir()) == []
    assert Path("/usr").exists()


def test_folders_in_folders_are_removed_without_recursion(tmp_path, monkeypatch):
    """Deeper than Python may call itself here, and than a path may be long."""
    depth = 400
    folder = tmp_path / "folder"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(folder)
    for _ in range(depth):
        os.mkdir("a-long-name")
        os.chdir("a-long-name")
    os.symlink(outside, "link")
    Path("file").touch()
    os.chmod(".", 0)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + depth // 2)
    try:
        sandbox._remove(str(folder))
    finally:
        sys.setrecursionlimit(limit)
    assert list(tmp_path.iterdir()) == [outside]


def test_programs_do_not_see_each_other():
    run("open('/tmp/left', 'w').write('x')")
    assert run("import os; print(os.listdir('/tmp'), os.getpid() < 10)").stdout == "['main.py'] True\n"


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_names_every_level_and_limit():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for level, isolation in sandbox.ISOLATION.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{level}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:] == list(isolation[1:])
    for name, value in ResourceLimits()._asdict().items():
        assert re.search(rf"`{name}` \({value:g}\)", page), name
