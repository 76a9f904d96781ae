"""Mutants: bugs of the field, put into this code one at a time, to see that a test notices each.

    python -m tests.mutants.run                        all of them; writes docs/mutants.md
    python -m tests.mutants.run --only "k3 reversed"   some of them; writes nothing
    python -m tests.mutants.run --thorough             those that their own tests let pass meet the whole suite

A copy of the checkout is mutated, never the checkout. A mutant is killed if a test it names fails; if it hangs, that is
said. One that breaks before a test can judge it (an import, a name, a shape) proves nothing and counts as not killed.
The exit status is 1 where fewer than 95 % are killed, 2 where a test fails without any mutant.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.mutants.list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2400  # of one mutant's tests, which take some ten: beyond it hangs
CRASHES = ("ImportError", "ModuleNotFoundError", "NameError", "AttributeError", "TypeError", "SyntaxError", "KeyError")


class Verdict(NamedTuple):
    kind: str  # killed, hangs, survives, breaks
    by: str  # the test and what it raised; for one that breaks, why
    seconds: float

    @property
    def killed(self) -> bool:
        return self.kind in ("killed", "hangs")


def mutated(source: str, mutant: Mutant) -> str:
    """The file with the bug in it. Raises ValueError unless the old text is in the function exactly once."""
    lines, (first, last) = source.splitlines(keepends=True), function_lines(source, mutant)
    before, inside, after = ("".join(part) for part in (lines[:first], lines[first:last], lines[last:]))
    count = inside.count(mutant.old)
    if count != 1:
        where = f"{mutant.file}, {mutant.function or 'the module'}"
        raise ValueError(f"mutant {mutant.name!r}: its old text is {count} times in {where}, not once")
    return before + inside.replace(mutant.old, mutant.new) + after


def function_lines(source: str, mutant: Mutant) -> tuple[int, int]:
    """The lines [first, last) of the mutant's function, decorators included; all of them where it names none."""
    if not mutant.function:
        return 0, len(source.splitlines())
    found = [node for name, node in definitions(ast.parse(source)) if name == mutant.function]
    if len(found) != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.file} defines {len(found)} {mutant.function}, not one")
    return min(node.lineno for node in (found[0], *found[0].decorator_list)) - 1, found[0].end_lineno


def definitions(node: ast.AST, prefix: str = ""):
    """(qualified name, node) of every function and class under the node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{child.name}", child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def copy_of_checkout(to: Path) -> None:
    """Tracked and untracked files as they stand, without what git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def environment(copy: Path) -> dict:
    """Tests import the copy, in their worker processes too; no stale bytecode; the shared folder of the checkout."""
    out = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500"}
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        out.setdefault("RLJAX_SHARED", str(shared))
    return out


def run_tests(copy: Path, arguments: tuple[str, ...], seconds: float | None) -> subprocess.CompletedProcess:
    """pytest in the copy. Raises subprocess.TimeoutExpired, the whole process group killed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=copy, env=environment(copy), start_new_session=True, **streams)
    try:
        out, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out)


def judge(copy: Path, mutant: Mutant, thorough: bool) -> Verdict:
    """The mutant's own tests on the copy with the bug in it; the copy is as it was afterwards."""
    path, began = copy / mutant.file, time.monotonic()
    source = path.read_text()
    path.write_text(mutated(source, mutant))
    try:
        done = run_tests(copy, mutant.tests, SECONDS)
        if done.returncode == 0 and thorough:
            done = run_tests(copy, (), None)
        return Verdict(*verdict(done), time.monotonic() - began)
    except subprocess.TimeoutExpired:
        return Verdict("hangs", f"no end within {SECONDS} s", time.monotonic() - began)
    finally:
        path.write_text(source)


def verdict(done: subprocess.CompletedProcess) -> tuple[str, str]:
    """(kind, by) from what pytest said."""
    if done.returncode == 0:
        return "survives", ""
    failed = re.search(r"^(FAILED|ERROR) (\S+?\.py)(?:::(.*?))?(?: - (.*))?$", done.stdout, re.MULTILINE)
    if failed is None or failed[1] == "ERROR" or done.returncode != 1:
        return "breaks", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"status {done.returncode}"
    _, file, name, why = failed.groups(default="")
    if why.startswith(CRASHES) or "jaxtyping" in why:
        return "breaks", f"{file}::{name}: {why}"
    return "killed", f"{file}::{name}"


def baseline(copy: Path, mutants: list[Mutant]) -> None:
    """Exits where a selected test fails without any mutant, or tests another checkout than the copy."""
    where = [sys.executable, "-c", "import rljax; print(rljax.__file__)"]
    found = subprocess.run(where, cwd=copy, env=environment(copy), check=True, capture_output=True, text=True).stdout
    if not Path(found.strip()).resolve().is_relative_to(copy.resolve()):
        sys.exit(f"tests would import {found.strip()}, not the copy in {copy}")
    began = time.monotonic()
    done = run_tests(copy, tuple(dict.fromkeys(t for mutant in mutants for t in mutant.tests)), None)
    if done.returncode:
        print(done.stdout)
        print("these tests fail without any mutant: nothing to be learned before they pass")
        sys.exit(2)
    print(f"without a mutant their tests pass ({time.monotonic() - began:.0f} s)", flush=True)


def page(verdicts: dict[str, Verdict]) -> str:
    """docs/mutants.md."""
    killed = sum(v.killed for v in verdicts.values())
    lines = [
        "# Mutants",
        "",
        "Bugs of the field, put into this code one at a time to see that a test notices each. Written by",
        "`make mutants`, which fails below 95 %; the bugs stand in `tests/mutants/list.py`.",
        "",
        f"**{killed} of {len(verdicts)} are noticed.**",
        "",
        "| mutant | in | where it happened, or what says otherwise | noticed by |",
        "|---|---|---|---|",
    ]
    for mutant in MUTANTS:
        found = verdicts[mutant.name]
        by = f"`{shown(found.by)}`" if found.kind == "killed" else f"**{found.kind}** {found.by}".strip()
        lines.append(f"| {mutant.name} | `{mutant.file.removeprefix('rljax/')}` | {mutant.source} | {by} |")
    left = [mutant for mutant in MUTANTS if not verdicts[mutant.name].killed]
    if left:
        lines += ["", "Not noticed:", ""]
        lines += [f"- {mutant.name}: {mutant.survives or 'a test is missing'}" for mutant in left]
    return "\n".join(lines) + "\n"


def shown(node: str) -> str:
    """A test's name for a table: the file under tests/, and the function, with its case if that is short."""
    name, _, case = node.removeprefix("tests/").partition("[")
    return (f"{name}[{case}" if case and len(case) <= 30 else name).replace("|", r"\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the names of some mutants")
    parser.add_argument(
        "--thorough", action="store_true", help="the whole suite for those that survive their own tests"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.only or ()) - {mutant.name for mutant in MUTANTS})
    if unknown:
        parser.error(f"no mutants of the names {unknown}; there are {sorted(mutant.name for mutant in MUTANTS)}")
    mutants = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]

    verdicts, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rljax-mutants-") as directory:
        copy = Path(directory) / "checkout"
        copy_of_checkout(copy)
        baseline(copy, mutants)
        for number, mutant in enumerate(mutants, 1):
            found = verdicts[mutant.name] = judge(copy, mutant, options.thorough)
            print(
                f"{number:3d}/{len(mutants)} {found.kind:8s} {found.seconds:4.0f} s  {mutant.name}  {found.by}",
                flush=True,
            )
    killed = sum(v.killed for v in verdicts.values())
    print(f"{killed} of {len(mutants)} killed, {time.monotonic() - began:.0f} s")
    if not options.only:
        (ROOT / "docs" / "mutants.md").write_text(page(verdicts))
    return 0 if killed >= 0.95 * len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
