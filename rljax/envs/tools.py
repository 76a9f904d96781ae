"""Environments in which a model calls tools until it gives its answer: any functions, in any format of calls."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rljax.envs.text import TextEnv, TextOrMessages, TextStep
from rljax.types import ToolCall

Parse = Callable[[str], Sequence[ToolCall]]  # what a model wrote -> its calls


class ToolUnavailable(RuntimeError):
    """A tool could not be had, which is not the model's doing: the turn ends in this error, and is not judged."""


class ToolState(NamedTuple):
    """A conversation with tools."""

    row: Mapping[str, Any]
    calls: int = 0  # so far


def tool_env(
    name: str,
    tools: Mapping[str, Callable],
    parse: Parse,
    prompt: Callable[[Mapping[str, Any]], TextOrMessages],
    grade: Callable[[str, Mapping[str, Any]], float | None],
    *,
    schemas: Sequence[dict] = (),
    role: str = "tool",
    max_calls: int = 16,
) -> TextEnv:
    """Turns with calls are answered with what the tools return; the first turn without one is the answer, and graded.

    A call that does not parse, of an unknown tool, with wrong arguments, or whose tool raises becomes an observation
    that says so. A tool that hangs meets the deadline of the turn, and one that raises ToolUnavailable ends it.

    Args:
      tools: functions by name, whose parameters Python knows. What they return is written as a text.
      parse: the calls in a turn, as of `rljax.data.tool_calls`.
      prompt: row -> how the conversation begins. grade: (answer, row) -> reward, None where it cannot be judged.
      schemas: of the tools, for the chat template. role: of the observations.
      max_calls: of a conversation; further ones are refused, in an observation.

    Raises ValueError for a tool whose parameters are not known: builtins such as `max`.
    """
    for called, tool in tools.items():
        try:
            inspect.signature(tool)
        except (TypeError, ValueError) as error:
            legal = f"a function written in Python, as lambda *numbers: {called}(*numbers)"
            raise ValueError(f"tool {called}: {error}; legal: {legal}") from None

    def reset(row: Mapping[str, Any], seed: int) -> tuple[ToolState, TextOrMessages]:
        return ToolState(row), prompt(row)

    def step(state: ToolState, text: str) -> TextStep:
        calls = parse(text)
        if not calls:
            return TextStep(state, reward=grade(text, state.row), terminated=True)
        observation = []
        failed = 0
        for number, call in enumerate(calls, state.calls + 1):
            if number > max_calls:
                call = call._replace(problem=f"more than {max_calls} calls")
            content, ok = call_tool(tools, call)
            failed += not ok
            observation.append({"role": role, "name": call.name or "tool", "content": content})
        info = {"tool_calls": len(calls), "failed_tool_calls": failed}
        return TextStep(state._replace(calls=state.calls + len(calls)), observation, info=info)

    return TextEnv(name, reset, step, tuple(schemas))


def call_tool(tools: Mapping[str, Callable], call: ToolCall) -> tuple[str, bool]:
    """What the model reads after a call, and whether the call was carried out.

    tools: as of `tool_env`, which has looked at their parameters. Raises ToolUnavailable alone.
    """
    if call.problem:
        return f"The call was not carried out: {call.problem}", False
    if call.name not in tools:
        return f"There is no tool {call.name}; legal: {', '.join(tools)}", False
    tool = tools[call.name]
    positional = [call.arguments[""]] if "" in call.arguments else []
    named = {name: value for name, value in call.arguments.items() if name}
    try:
        inspect.signature(tool).bind(*positional, **named)
    except TypeError as error:
        return f"{call.name}: {error}; legal: {call.name}{inspect.signature(tool)}", False
    try:
        return str(tool(*positional, **named)), True
    except ToolUnavailable:
        raise
    except (Exception, SystemExit) as error:
        return f"{call.name} failed: {type(error).__name__}: {error}", False


def make_python_tool(run_code: Callable[[str], Any]) -> Callable[[str], str]:
    """The tool `python`, whose programs run where `run_code` runs them: in a sandbox, never in this process.

    run_code: source -> an execution with status, stdout, stderr and exit_code, as of `rljax.rewards.sandbox`.
    """

    def python(code: str) -> str:
        """Run a Python program and read what it prints.

        Args:
            code: The program. Only what it prints is seen.
        """
        if not isinstance(code, str):
            raise TypeError(f"code is of type {type(code).__name__}; legal: a text")
        done = run_code(code)
        parts = [done.stdout, done.stderr] if done.stderr else [done.stdout]
        if done.status != "ok":
            parts.append(f"[{done.status}, exit code {done.exit_code}]")
        return "\n".join(part.rstrip("\n") for part in parts if part) or "[no output]"

    return python
