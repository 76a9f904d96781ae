"""The environments that `--environment` can name, each with the rows of its episodes."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

from rljax.data.files import read_table
from rljax.data.tool_calls import TOOL_FORMATS, tool_schema
from rljax.envs.calculator import calculator
from rljax.envs.games import guessing_game, spoken_maze
from rljax.envs.gymnasium import make_gymnasium
from rljax.envs.maze import make_maze
from rljax.envs.reasoning_gym import make_reasoning_gym
from rljax.envs.text import TextEnv
from rljax.envs.tools import ToolUnavailable, make_python_tool, tool_env
from rljax.envs.verifiers import make_verifiers
from rljax.rewards.number import exact_number
from rljax.rewards.sandbox import Execution, Level, SandboxError, probe_isolation, run_code

ToolFormat = Literal[tuple(TOOL_FORMATS)]
# How the answer is to be written, for `exact_number`.
ASK = "{question}\nUse the tools where they help. When you know the answer, write it after ####, as in #### 12."
# In a conversation. All of them in one turn, each to its own deadline, end before that of the turn (30 s): a model that
# hangs in its programs is answered, and not left without a reward.
PROGRAMS = 4


class NamedEnvironment(NamedTuple):
    """An environment and the rows of its episodes."""

    env: TextEnv
    rows: list[dict]


def calculator_env(parse: Callable, isolation: Level = "namespaces") -> TextEnv:
    """Word problems (columns `question` and `answer`, as in GSM8K) with a calculator, which needs no isolation."""
    tools = {"calculator": calculator}
    return tool_env("calculator", tools, parse, _ask, _grade, schemas=[tool_schema(calculator)])


def python_env(parse: Callable, isolation: Level = "namespaces") -> TextEnv:
    """Word problems with Python programs, which run in the sandbox. Raises SandboxError where there is none."""
    probe_isolation(isolation)
    python = make_python_tool(partial(_run_program, isolation=isolation))
    schemas = [tool_schema(python)]
    return tool_env("python", {"python": python}, parse, _ask, _grade, schemas=schemas, max_calls=PROGRAMS)


def _run_program(source: str, isolation: Level) -> Execution:
    """In the sandbox. Raises ToolUnavailable where it could not be set up."""
    try:
        return run_code(source, isolation=isolation)
    except SandboxError as error:
        raise ToolUnavailable(f"the sandbox: {error}") from None


def _ask(row: Mapping[str, Any]) -> str:
    return ASK.replace("{question}", row["question"])


def _grade(text: str, row: Mapping[str, Any]) -> float | None:
    return exact_number(text, row["answer"])


def named_environment(
    name: str, tool_format: ToolFormat, files: str, episodes: int, seed: int, isolation: Level = "namespaces"
) -> NamedEnvironment:
    """The environment of this name.

    Raises ValueError, listing what is legal, for a name that is none, and for a row that cannot be asked or graded.

    Args:
      name: calculator or python, with rows of a file; maze or guess; gymnasium:ID, reasoning_gym:TASK, or
        verifiers:TASKSET, a taskset that is installed.
      tool_format: in which the model writes calls.
      files: the jsonl file of rows. episodes: how many rows there are of an environment that needs none.
      isolation: of the sandbox, for python.
    """
    kind, _, which = name.partition(":")
    if kind in TOOL_ENVIRONMENTS and not which:
        if not files:
            raise ValueError(
                f"environment {name}: which problems? legal: --prompts FILE.jsonl, columns question, answer"
            )
        return NamedEnvironment(TOOL_ENVIRONMENTS[kind](TOOL_FORMATS[tool_format], isolation), _read_problems(files))
    if files:
        raise ValueError(f"environment {name} has rows of its own; legal: without --prompts")
    if kind in GAMES and not which:
        return NamedEnvironment(GAMES[kind](), [{"episode": i} for i in range(episodes)])
    if kind in PACKAGES and which:
        return PACKAGES[kind](which, episodes, seed)
    packages = ", ".join(f"{package}:NAME" for package in PACKAGES)
    raise ValueError(f"environment {name!r}; legal: {', '.join([*TOOL_ENVIRONMENTS, *GAMES])}, {packages}")


def _read_problems(path: str) -> list[dict]:
    """The rows of a file. Raises ValueError, naming the row, where a question or a number as answer is missing."""
    table = read_table(path)
    for i, row in enumerate(table.rows):
        for column in ("question", "answer"):
            if row.get(column) is None:
                raise ValueError(f"{table.place(i)}: no column {column!r}; legal: columns question and answer")
        if not isinstance(row["question"], str):
            found = type(row["question"]).__name__
            raise ValueError(f"{table.place(i, 'question')} is of type {found}; legal: a text")
        try:
            exact_number("", row["answer"])
        except ValueError as error:
            raise ValueError(f"{table.place(i)}: {error}") from None
    return table.rows


def _of_gymnasium(name: str, episodes: int, seed: int) -> NamedEnvironment:
    gymnasium = _import("gymnasium", "agents")
    try:
        modes = gymnasium.make(name).metadata.get("render_modes", [])
    except gymnasium.error.Error as error:
        raise ValueError(f"gymnasium: {error}") from None
    settings = {"render_mode": "ansi"} if "ansi" in modes else {}
    env = make_gymnasium(partial(gymnasium.make, name, **settings), f"gymnasium:{name}")
    return NamedEnvironment(env, [{"episode": i} for i in range(episodes)])


def _of_reasoning_gym(name: str, episodes: int, seed: int) -> NamedEnvironment:
    return NamedEnvironment(*make_reasoning_gym(name, episodes, seed))


def _of_verifiers(name: str, episodes: int, seed: int) -> NamedEnvironment:
    vf = _import("verifiers.v1", "verifiers")
    taskset = vf.load_taskset(vf.TasksetConfig(id=name)).take(episodes)
    return NamedEnvironment(*make_verifiers(taskset, f"verifiers:{name}"))


def _import(package: str, extra: str) -> ModuleType:
    """The package. Raises ImportError, saying how it is installed, where it is absent."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} cannot be imported ({error}): pip install 'rljax[{extra}]'") from None


TOOL_ENVIRONMENTS = {"calculator": calculator_env, "python": python_env}
GAMES = {"maze": lambda: spoken_maze(make_maze()), "guess": guessing_game}
PACKAGES = {"gymnasium": _of_gymnasium, "reasoning_gym": _of_reasoning_gym, "verifiers": _of_verifiers}
