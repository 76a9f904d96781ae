"""Calls of tools in the formats of models: what they write is read back, and what does not parse says why."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rljax.data.tool_calls import TOOL_FORMATS, parse_hermes, parse_llama3, parse_plain, tool_schema
from rljax.types import ToolCall

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[a-z_]\w{0,9}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3)


def written(name: str, arguments: dict, key: str) -> str:
    """As the chat templates of Qwen and Llama write a call; the end of the tag cannot stand inside JSON text."""
    return json.dumps({"name": name, key: arguments}).replace("</", "<\\/")


@given(calls, st.sampled_from(["", "Let me think.\n"]))
def test_hermes_reads_what_qwen_writes(drawn, before):
    text = before + "\n".join(f"<tool_call>\n{written(*call, 'arguments')}\n</tool_call>" for call in drawn)
    if "<tool_call>" in json.dumps(drawn):
        return
    assert parse_hermes(text) == [ToolCall(*call) for call in drawn]


@pytest.mark.parametrize(
    "thought",
    ["<think>{}</think>", "I could {}.\n</think>\n", "<think>a</think><think>{}</think>"],
    ids=["whole", "begun by the prompt", "two"],
)
def test_hermes_makes_no_call_that_is_only_thought_of(thought):
    mentioned = '<tool_call>{"name": "mentioned"}</tool_call>'
    made = '<tool_call>{"name": "made"}</tool_call>'
    thought = thought.format(mentioned)
    assert parse_hermes(thought + made) == [ToolCall("made", {})]
    assert parse_hermes(thought) == []
    assert parse_hermes("<think>" + mentioned) == [], "the turn is cut within a thought"


@given(calls, st.booleans())
def test_llama3_reads_what_llama_writes(drawn, has_tag):
    text = "<|python_tag|>" * has_tag + "; ".join(written(*call, "parameters") for call in drawn)
    if "<|python_tag|>" in json.dumps(drawn):
        return
    assert parse_llama3(text) == [ToolCall(*call) for call in drawn]


def test_the_plain_format():
    assert parse_plain("a <call>add(1, 2)</call> b<call> f() </call>") == [
        ToolCall("add", {"": "1, 2"}),
        ToolCall("f", {"": ""}),
    ]
    assert parse_plain("<calc((1+2)*3)>", "<", ">") == [ToolCall("calc", {"": "(1+2)*3"})]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("text", ["", "4", "a < b", "The answer is 4.", '{"answer": 4}', "<think>call</think>"])
def test_an_answer_is_no_call(name, text):
    assert TOOL_FORMATS[name](text) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("hermes", "<tool_call>{", "a call without its closing tag: {"),
        ("hermes", "<tool_call>{</tool_call>", "{ is no JSON"),
        ("hermes", "<tool_call>[]</tool_call>", '[] has no name; legal: {"name": NAME, "arguments": {...}}'),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', "has no name"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "a"}</tool_call>', 'arguments of f are "a"; legal'),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "is no JSON"),
        ("llama3", "<|python_tag|>print(1)", "print(1) is no JSON"),
        ("llama3", "<|python_tag|> ", "is no JSON"),
        ("llama3", '{"name": "f", "parameters": {', "is no JSON"),
        ("llama3", '{"name": "f", "parameters": 3}', "parameters of f are 3"),
        ("plain", "<call>add 1</call>", "add 1 is no call; legal: <call>NAME(ARGUMENT)</call>"),
        ("plain", "<call>add(1)", "<call> without </call>: add(1)"),
    ],
)
def test_a_call_that_does_not_parse_says_why(name, text, problem):
    (call,) = TOOL_FORMATS[name](text)
    assert problem in call.problem
    assert len(call.problem) < 400


def test_of_several_calls_the_good_ones_are_read():
    good = '<tool_call>{"name": "f"}</tool_call>'
    assert [call.problem == "" for call in parse_hermes(f"{good}<tool_call>x</tool_call>{good}")] == [True, False, True]


def test_the_schema_of_a_function():
    def power(base: float, exponent: int = 2) -> float:
        """Raise a number to a power.

        Args:
            base: The number.
            exponent: The power.
        """

    found = tool_schema(power)["function"]
    assert found["description"] == "Raise a number to a power."
    assert found["parameters"]["properties"]["exponent"] == {"type": "integer", "description": "The power."}
    assert found["parameters"]["required"] == ["base"]

    def untold(x: int):
        """Something."""

    def untyped(x):
        """Something.

        Args:
            x: A number.
        """

    for function in (untold, untyped):
        with pytest.raises(ValueError, match=f"the tool {function.__name__}: .*legal: types for all arguments"):
            tool_schema(function)
