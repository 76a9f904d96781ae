"""Environments with tools, the calculator, and the games in words."""

import math
import random
from fractions import Fraction
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from rljax.data.tool_calls import TOOL_FORMATS, tool_schema
from rljax.envs.calculator import calculator, evaluate_arithmetic
from rljax.envs.games import DIRECTIONS, guessing_game, spoken_maze
from rljax.envs.maze import make_maze
from rljax.envs.text import TurnLimits, play_each
from rljax.envs.tools import ToolUnavailable, call_tool, make_python_tool, tool_env
from rljax.types import ToolCall

# ---------------------------------------------------------------------------------------------------------- calculator

numbers = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=3).map(str)
arithmetic = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=5,
)


@given(arithmetic)
def test_the_calculator_agrees_with_float64(expression):
    try:
        want = eval(expression)  # of numbers and + - * / that this test drew
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate_arithmetic(expression)
        return
    exact = evaluate_arithmetic(expression)
    scale = sum(
        abs(float(text)) for text in expression.replace("(", " ").replace(")", " ").split() if text[0].isdigit()
    )
    assert float(exact) == pytest.approx(want, rel=1e-9, abs=1e-9 * (1 + scale**3))


def test_what_it_writes():
    assert calculator("1,000 * 3") == "3000"
    assert calculator("-7 // 2 + 7 % 3") == "-3"
    assert calculator("$2 ÷ 3") == "0.6666666667"
    assert calculator("2^10") == "1024"
    assert calculator("12345678901 / 2") == "6172839450.5"
    assert calculator("1,234,567,890.55 * 10") == "12345678905.5"
    assert calculator("99999999.999") == "99999999.999"
    assert calculator("12345678901234567.89 - 1") == "12345678901234566.89"
    assert calculator("10 ** 20 / 3") == "33333333333333333333.3333333333"
    assert calculator("-1 / 10 ** 12") == "-0.000000000001"
    assert evaluate_arithmetic("0.1 + 0.2") == Fraction(3, 10)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "is no arithmetic"),
        ("1 +", "is no arithmetic"),
        ("1,5 + 1", "is no arithmetic"),
        ("12,34", "is no arithmetic"),
        ("__import__('os').system('true')", "is no arithmetic; legal: numbers"),
        ("[1 for _ in (1,)]", "is no arithmetic"),
        ("True + 1", "is no arithmetic"),
        ("1j", "is no arithmetic"),
        ("'a' * 9", "is no arithmetic"),
        ("9 ** 9 ** 9", "a power is too large"),
        ("1.000001 ** 999999999", "a power is too large"),
        ("2 ** 0.5", "must be a whole number"),
        ("0 ** -1", "division by zero"),
        ("1 % 0", "division by zero"),
        ("1e999", "too large"),
        ("9" * 100 + "* 9", "too large"),
        ("1" * 201, "at most 200 characters"),
        (12, "at most 200 characters"),
        ("(" * 100 + "1", "is no arithmetic"),
    ],
)
def test_what_the_calculator_refuses(expression, message):
    with pytest.raises(ValueError, match=message):
        evaluate_arithmetic(expression)


# --------------------------------------------------------------------------------------------------------------- tools


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def divide(a):
    return 1 / a


class Silent:
    def __str__(self):
        raise RuntimeError("no text")


def leave():
    raise SystemExit(1)


TOOLS = {"add": add, "divide": divide, "silent": Silent, "leave": leave, "bytes": lambda: b"\xff"}


@pytest.mark.parametrize(
    ("call", "text", "ok"),
    [
        (ToolCall("add", {"a": 1, "b": 2}), "3", True),
        (ToolCall("bytes", {}), "b'\\xff'", True),
        (ToolCall("add", {}), "add: missing a required argument: 'a'; legal: add(a: int, b: int = 1) -> int", False),
        (ToolCall("add", {"a": 1, "c": 2}), "add: got an unexpected keyword argument 'c'; legal: add(", False),
        (ToolCall("divide", {"": 0}), "divide failed: TypeError", False),
        (ToolCall("divide", {"a": 0}), "divide failed: ZeroDivisionError: division by zero", False),
        (ToolCall("silent", {}), "silent failed: RuntimeError: no text", False),
        (ToolCall("leave", {}), "leave failed: SystemExit: 1", False),
        (ToolCall("multiply", {}), "There is no tool multiply; legal: add, divide, silent, leave, bytes", False),
        (ToolCall("", {}, "{ is no JSON"), "The call was not carried out: { is no JSON", False),
    ],
)
def test_a_call_always_has_an_answer(call, text, ok):
    call = call._replace(arguments={"": "0"}) if call.arguments == {"": 0} else call
    answer, was_ok = call_tool(TOOLS, call)
    assert answer.startswith(text)
    assert was_ok is ok


def test_a_tool_that_is_not_to_be_had_leaves_the_turn_unjudged():
    def unavailable(_):
        raise ToolUnavailable("no sandbox")

    env = tool_env("none", {"f": unavailable}, TOOL_FORMATS["plain"], lambda row: "?", graded)
    state, _ = env.reset({}, 0)
    (turn,) = play_each(env, [state], ["<call>f()</call>"], TurnLimits(timeout_seconds=60.0))
    assert turn.status == "raised"
    assert "no sandbox" in str(turn)


@pytest.mark.parametrize(("tool", "problem"), [(max, "no signature found for builtin"), (3, "3 is not a callable")])
def test_a_tool_without_known_parameters_is_refused_at_once(tool, problem):
    with pytest.raises(ValueError, match=rf"tool largest: {problem}.*; legal: a function written in Python"):
        tool_env("none", {"largest": tool}, TOOL_FORMATS["plain"], lambda row: "?", graded)


def graded(answer, row):
    return float(answer == row["answer"])


def test_calls_are_answered_until_there_is_an_answer():
    env = tool_env(
        "sums", TOOLS, TOOL_FORMATS["hermes"], lambda row: row["question"], graded, schemas=[tool_schema(add)]
    )
    state, observation = env.reset({"question": "1 + 2?", "answer": "3"}, 0)
    assert observation == "1 + 2?"
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    first = env.step(state, f"Let me see. {call} {call.replace('add', 'sub')} <tool_call>{{</tool_call>")
    assert [message["role"] for message in first.observation] == ["tool"] * 3
    assert [message["name"] for message in first.observation] == ["add", "sub", "tool"]
    assert first.observation[0]["content"] == "3"
    assert first.observation[2]["content"].startswith("The call was not carried out: { is no JSON")
    assert (first.reward, first.terminated, first.info) == (0.0, False, {"tool_calls": 3, "failed_tool_calls": 2})
    last = env.step(first.state, "3")
    assert (last.reward, last.terminated) == (1.0, True)
    assert env.step(state, "4").reward == 0.0
    assert env.tools[0]["function"]["parameters"]["required"] == ["a"]


def test_too_many_calls_are_refused_in_words():
    env = tool_env("sums", TOOLS, TOOL_FORMATS["plain"], lambda row: "?", graded, max_calls=2)
    state, _ = env.reset({}, 0)
    step = env.step(state, "<call>bytes()</call>" * 3)
    assert step.observation[2]["content"] == "The call was not carried out: more than 2 calls"
    assert "more than 2" in env.step(step.state, "<call>bytes()</call>").observation[0]["content"]


def test_the_python_tool_shows_what_a_program_printed():
    def run_code(source):
        done = {"a": ("ok", "1\n2\n", "", 0), "b": ("error", "x", "Traceback\n", 1), "c": ("timeout", "", "", None)}[
            source
        ]
        return SimpleNamespace(**dict(zip(("status", "stdout", "stderr", "exit_code"), done, strict=True)))

    python = make_python_tool(run_code)
    assert python("a") == "1\n2"
    assert python("b") == "x\nTraceback\n[error, exit code 1]"
    assert python("c") == "[timeout, exit code None]"
    assert tool_schema(python)["function"]["name"] == "python"
    for wrong in (123, None, ["a"], {"a": 1}, True):
        answer = f"python failed: TypeError: code is of type {type(wrong).__name__}; legal: a text"
        assert call_tool({"python": python}, ToolCall("python", {"code": wrong})) == (answer, False)


# --------------------------------------------------------------------------------------------------------------- games


@pytest.mark.parametrize("slip", [0.0, 0.5])
def test_the_spoken_maze_is_the_maze(slip):
    """Against the environment itself, step by step with the same keys."""
    maze = make_maze(slip=slip, max_steps=6)
    env = spoken_maze(maze)
    choose = random.Random(0)
    ends = set()
    for seed in range(12):
        state, prompt = env.reset({}, seed)
        key, carried = jax.random.split(jax.random.key(seed))
        _, want = maze.reset(key, maze.params)
        assert "ends the game with +10" in prompt
        assert prompt.endswith("You are in row 1, column 1.")
        while True:
            word = choose.choice(DIRECTIONS)
            step = env.step(state, f"Not up or down, I go {word}.")
            key, carried = jax.random.split(carried)
            done = maze.step(key, want, DIRECTIONS.index(word), maze.params)
            row, column = np.asarray(done.state.position) + 1
            assert step.observation == f"You are in row {row}, column {column}."
            assert (step.reward, step.terminated, step.truncated) == (done.reward, done.terminated, done.truncated)
            state, want = step.state, done.state
            if step.terminated or step.truncated:
                ends.add((step.terminated, step.reward))
                break
    assert len(ends) > 1


def test_a_turn_without_a_direction_is_no_step():
    env = spoken_maze(make_maze())
    state, _ = env.reset({}, 0)
    step = env.step(state, "Support my countdown: I stay here, outright.")
    assert step.state is state
    assert (step.observation, step.info) == ("Answer up, down, left or right.", {"illegal_moves": 1})


def test_bisection_wins_the_guessing_game():
    env = guessing_game(1, 100, guesses=7)
    for seed in range(30):
        state, prompt = env.reset({}, seed)
        assert "1 to 100" in prompt
        low, high = 1, 100
        while True:
            guess = (low + high) // 2
            step = env.step(state, f"Is it {guess}?")
            state = step.state
            if step.terminated:
                break
            low, high = (guess + 1, high) if step.observation == "Higher." else (low, guess - 1)
        assert step.reward == 1.0
    assert len({env.reset({}, seed)[0].secret for seed in range(30)}) > 20


def test_the_guesses_run_out():
    env = guessing_game(guesses=3)
    state, _ = env.reset({"secret": 50}, 0)
    hints = []
    for text in ("60", "no idea", "40"):
        step = env.step(state, text)
        state = step.state
        hints.append((step.observation, step.reward, step.terminated))
    assert hints == [("Lower.", 0.0, False), ("That is no whole number.", 0.0, False), ("Higher.", 0.0, True)]
    with pytest.raises(ValueError, match="legal: low <= high, at least 1 guess"):
        guessing_game(5, 4)
    assert math.isclose(env.step(env.reset({"secret": 50}, 0)[0], "50").reward, 1.0)
