"""Calls of tools as models write them, and what a chat template is told of the tools.

| format | a turn with a call |
|---|---|
| hermes | `<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>`: Hermes, Qwen2.5, Qwen3 |
| llama3 | the turn is `{"name": "add", "parameters": {"a": 1}}`, after `<|python_tag|>` or not; `;` between calls |
| plain | `<call>add(1, 2)</call>`: the text between the parentheses is the argument, for tiny models |

What stands between <think> and </think> is a thought: a call that it mentions is not made (hermes).

A call that does not parse is a call with a `problem`: the conversation goes on with an observation that says so.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from rljax.types import ToolCall

PYTHON_TAG = "<|python_tag|>"
# A thought may be begun by the prompt, and a turn may be cut within one.
THOUGHT = re.compile(r"(\A|<think>).*?</think>|<think>.*", re.DOTALL)
MAX_SHOWN = 100  # characters of a call that does not parse, in its problem


def parse_hermes(text: str) -> list[ToolCall]:
    """The calls between <tool_call> and </tool_call>: JSON objects with "name" and "arguments"."""
    pieces = THOUGHT.sub("", text).split("<tool_call>")[1:]
    calls = []
    for piece in pieces:
        inside, end, _ = piece.partition("</tool_call>")
        if end:
            calls.append(_read_call(inside, "arguments"))
        else:
            calls.append(ToolCall("", {}, f"a call without its closing tag: {_shown(inside)}"))
    return calls


def parse_llama3(text: str) -> list[ToolCall]:
    """The calls of a turn that begins with <|python_tag|>, or with a JSON object that has a "name"."""
    parts = [part.strip() for part in text.split(PYTHON_TAG)]
    if len(parts) > 1:
        return [call for part in parts[1:] for call in _read_calls(part)]
    is_call = re.match(r'\{\s*"(name|type|parameters|function)"', parts[0]) is not None
    return _read_calls(parts[0]) if is_call else []


def _read_calls(text: str) -> list[ToolCall]:
    """Calls with ";" between them; nothing at all is a call that does not parse."""
    calls = []
    while text or not calls:
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            end = len(text)
        calls.append(_read_call(text[:end], "parameters"))
        text = text[end:].lstrip(" \t\r\n;")
    return calls


def parse_plain(text: str, start: str = "<call>", end: str = "</call>") -> list[ToolCall]:
    """The calls NAME(TEXT) between two marks; TEXT is the argument as it stands, under the name ""."""
    calls = []
    for piece in text.split(start)[1:]:
        inside, closed, _ = piece.partition(end)
        found = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", inside, flags=re.DOTALL)
        if closed and found:
            calls.append(ToolCall(found[1], {"": found[2]}))
        else:
            wrong = f"{_shown(inside)} is no call" if closed else f"{start} without {end}: {_shown(inside)}"
            calls.append(ToolCall("", {}, f"{wrong}; legal: {start}NAME(ARGUMENT){end}"))
    return calls


TOOL_FORMATS: dict[str, Callable[[str], list[ToolCall]]] = {
    "hermes": parse_hermes,
    "llama3": parse_llama3,
    "plain": parse_plain,
}


def tool_schema(function: Callable) -> dict[str, Any]:
    """The JSON schema of a function, from its signature and its docstring, as chat templates take it in `tools`.

    Raises ValueError where a type or a description is missing.
    """
    from transformers.utils import chat_template_utils  # a second of import: only where it is needed

    errors = (chat_template_utils.DocstringParsingException, chat_template_utils.TypeHintParsingException)
    try:
        return chat_template_utils.get_json_schema(function)
    except errors as error:
        raise ValueError(
            f"the tool {function.__name__}: {error}; legal: types for all arguments, and a docstring with a line for "
            "each under Args:"
        ) from None


def _read_call(text: str, key: str) -> ToolCall:
    """The call in a JSON object {"name": ..., key: {...}}."""
    legal = f'legal: {{"name": NAME, "{key}": {{...}}}}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall("", {}, f"{_shown(text)} is no JSON ({error}); {legal}")
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str):
        return ToolCall("", {}, f"{_shown(text)} has no name; {legal}")
    arguments = found.get(key, {})
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, f"{key} of {name} are {_shown(json.dumps(arguments))}; {legal}")
    return ToolCall(name, arguments)


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
