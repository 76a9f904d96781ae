"""What a run was computed with: the source of the functions handed to it, and the git revision.

A run directory keeps them as text that a person can read and compare, in a folder for each change:

    functions/step_0/algorithm.py         what was called from step 0 on
    functions/step_0/git_revision.txt
    functions/step_20/...                 only where the run was resumed at step 20 with other sources

`diff -r functions/step_0 functions/step_20` then shows what changed in between.

The text of a function holds its source, the values that it closes over and its defaults, the constants that it reads,
and the same of each function that it closes over or calls by name. Calls into the standard library and into other
installed packages are not followed. Arrays are described by shape and dtype, other objects by their type.
"""

import dataclasses
import functools
import hashlib
import inspect
import shutil
import subprocess
import sysconfig
import textwrap
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REVISION_FILE = "git_revision.txt"
MAX_CHARACTERS = 500  # of one value; of a longer one the beginning and a digest
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
Constant = None | bool | int | float | complex | str | bytes


def git_revision() -> str | None:
    """The git revision of this code, with + if it was changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def source_digest() -> str:
    """sha256 of the Python files of this code: of the package and of the experiments beside it."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for file in sorted(path for name in ("rljax", "experiments") for path in (root / name).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def function_source(value: Any) -> str:
    """The source of a function, or of all the functions in a tuple, list, dict or dataclass, as one text."""
    functions: list[types.FunctionType] = []
    sections = [f"# {_describe(value, functions)}"]
    done = set()
    for function in functions:  # grows as functions are described
        if id(function) not in done:
            done.add(id(function))
            sections.append(_section(function, functions))
    return "\n\n".join(sections) + "\n"


def record_sources(directory: str | Path, step: int, sources: Mapping[str, str]) -> list[str]:
    """Keep the sources that a run uses from `step` on, unless they are those that it used before.

    What was recorded at `step` or later is dropped: those steps are computed again.

    Args:
      directory: the folder `functions` of a run. sources: file name -> text.

    Returns: the names of the files that differ from those used before `step`, were added or are gone.
    """
    directory = Path(directory)
    recorded = {int(folder.name.removeprefix("step_")): folder for folder in directory.glob("step_*")}
    for number, folder in recorded.items():
        if number >= step:
            shutil.rmtree(folder)
    before = max((number for number in recorded if number < step), default=None)
    known = {} if before is None else _read_texts(recorded[before])
    changed = sorted(name for name in known.keys() | sources.keys() if known.get(name) != sources.get(name))
    if changed:
        folder = directory / f"step_{step}"
        folder.mkdir(parents=True)
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
    return [] if before is None else changed


def run_sources(functions: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text: the source of each function, and the git revision."""
    texts = {f"{name}.py": function_source(function) for name, function in functions.items()}
    return {**texts, REVISION_FILE: f"{git_revision() or 'unknown'}\n"}


def _read_texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def _section(function: types.FunctionType, functions: list) -> str:
    """The source of one function with the values that it uses. Functions among these are appended to `functions`."""
    lines = [f"# {_name(function)}"]
    for name, value in _values_used(function):
        lines.append(f"#   {name} = {_describe(value, functions)}")
    try:
        source = textwrap.dedent(inspect.getsource(function)).rstrip("\n")
    except (OSError, TypeError):  # typed at a prompt, made by exec
        source = "# its source is not in a file"
    return "\n".join([*lines, source])


def _values_used(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Name and value of what a function closes over, of its defaults, and of the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if function.__defaults__:
        yield "defaults", function.__defaults__
    if function.__kwdefaults__:
        yield "keyword defaults", function.__kwdefaults__
    names = sorted(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            with warnings.catch_warnings(action="ignore"):  # numpy warns where it is asked for "str"
                members = [(f"{name}.{member}", getattr(value, member, None)) for member in names]
            yield from ((label, member) for label, member in members if _is_followed(member, function))
        elif name in function.__globals__ and (_is_constant(value) or _is_followed(value, function)):
            yield name, value


def _names(code: types.CodeType) -> set[str]:
    """Globals and attributes that a function and the functions inside of it name."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(item) for item in value)
    return isinstance(value, Constant)


def _is_followed(value: Any, caller: types.FunctionType) -> bool:
    """Whether a function that is called by name belongs to the caller's package, or to none that is installed."""
    function = _plain_function(value)
    if function is None:
        return False
    same_package = function.__module__.partition(".")[0] == caller.__module__.partition(".")[0]
    return same_package or not function.__code__.co_filename.startswith((*INSTALLED, "<"))


def _plain_function(value: Any) -> types.FunctionType | None:
    """The Python function behind a method, a decorated or a compiled function; None for anything else."""
    if isinstance(value, type) or not callable(value):
        return None
    value = inspect.unwrap(value)
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def _name(function: types.FunctionType) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _describe(value: Any, functions: list) -> str:
    """A value as text, the same in every process. Functions in it are appended to `functions`."""
    text = _describe_in_full(value, functions)
    if len(text) <= MAX_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[:MAX_CHARACTERS]} ... (sha256 {digest})"


def _describe_in_full(value: Any, functions: list) -> str:
    if isinstance(value, Constant):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial{_describe((value.func, value.args, value.keywords), functions)}"
    function = _plain_function(value)
    if function is not None:
        functions.append(function)
        return _name(function)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = value._asdict()
    if isinstance(value, Mapping):
        items = [f"{key}: {_describe(item, functions)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_describe(item, functions) for item in value) + ")"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_describe(item, functions) for item in value)) + "}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}{_describe((type(value).__call__,), functions)}"
    kind = value if isinstance(value, type) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
