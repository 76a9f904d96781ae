"""What a row is for, told by its columns, which have the names of TRL's dataset formats.

| format | columns |
|---|---|
| text | `text`, or `messages` |
| prompt | `prompt` |
| prompt-completion | `prompt`, `completion` |
| preference | `chosen`, `rejected`, and `prompt` unless both begin with it; `margin` if the pair was rated |
| unpaired preference | `prompt`, `completion`, `label` (true: desirable) |
| stepwise supervision | `prompt`, `completions` (the steps), `labels` (of each step) |
| ranking | `prompt`, `completions` (the best first) |

Each is standard (strings) or conversational (lists of messages {"role", "content"}), told by type. Other columns go
along: verifiers read them, and `tools` is what a chat template is told of functions.
"""

from collections.abc import Mapping
from typing import Any

FORMATS = {  # the most specific first
    "stepwise supervision": {"prompt", "completions", "labels"},
    "ranking": {"prompt", "completions"},
    "unpaired preference": {"prompt", "completion", "label"},
    "prompt-completion": {"prompt", "completion"},
    "preference": {"chosen", "rejected"},
    "prompt": {"prompt"},
    "text": {"text"},
    "text, a conversation": {"messages"},
}
TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")

# What some format or method reads of a row. A row that is made of another's prompt has its own of these, or none.
READ = {*TEXTS, "completions", "label", "labels", "margin", "ended"}

Row = Mapping[str, Any]
Message = Mapping[str, Any]


def format_of(row: Row) -> str:
    """The name of the row's format. Raises ValueError, listing what would be one, where the columns are of none, or
    where one of chosen and rejected is missing.
    """
    if ("chosen" in row) != ("rejected" in row):
        missing = "rejected" if "chosen" in row else "chosen"
        raise ValueError(f"no column {missing!r}; the row has {', '.join(row)}; legal: both or neither")
    for name, columns in FORMATS.items():
        if columns <= row.keys():
            return name
    legal = "; ".join(" + ".join(sorted(columns)) for columns in FORMATS.values())
    raise ValueError(f"columns {', '.join(row) or 'none'}; legal: {legal}")


def other_columns(row: Row) -> dict[str, Any]:
    """The columns that go along whatever the row is for: those that no format reads."""
    return {name: value for name, value in row.items() if name not in READ}


def is_conversation(value: Any) -> bool:
    """Whether a column holds messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def is_conversational(row: Row, *columns: str) -> bool:
    """Whether these columns (default: all that hold texts) are conversations.

    Raises ValueError, naming the columns, where one is missing or null, and where some are strings.
    """
    for name in columns:
        if name not in row:
            raise ValueError(f"no column {name!r}; the row has {', '.join(row) or 'none'}")
    kinds = {name: is_conversation(row[name]) for name in columns or TEXTS if name in row}
    for name, conversation in kinds.items():
        if not (conversation or isinstance(row[name], str)):
            raise ValueError(f"column {name!r} holds {_shown(row[name])}; legal: a text, or a list of messages")
    if len(set(kinds.values())) > 1:
        texts = ", ".join(name for name, conversation in kinds.items() if not conversation)
        conversations = ", ".join(name for name, conversation in kinds.items() if conversation)
        raise ValueError(f"text in {texts}, a conversation in {conversations}; legal: all texts or all conversations")
    return any(kinds.values())


def text_of(row: Row, column: str) -> str:
    """The text of a column. Raises ValueError, naming it, where there is none."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {_shown(value)}; legal: a text")
    return value


def messages_of(row: Row, column: str) -> list[dict]:
    """The messages of a column, their content parts joined. Raises ValueError, naming it, for what is no message."""
    value = row.get(column)
    if not is_conversation(value):
        raise ValueError(f"column {column!r} holds {_shown(value)}; legal: a list of messages")
    return [_message(message, f"column {column!r}, message {i}") for i, message in enumerate(value, 1)]


def _message(message: Message, place: str) -> dict:
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{place} has no role; legal: {{'role': 'user', 'content': ...}}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    calls_a_tool = bool(message.get("tool_calls"))
    if content is None and calls_a_tool:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{place} has as its content {_shown(content)}; legal: a text, or text parts")
    # Columns of a parquet file have every key in every message, null where it was absent.
    rest = {name: value for name, value in message.items() if value is not None}
    return {**rest, "content": content}


def _part(part: Any, place: str) -> str:
    if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        raise ValueError(f"{place} has the part {_shown(part)}; legal: {{'type': 'text', 'text': ...}}")
    return part["text"]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"a {type(value).__name__}, {text if len(text) <= 60 else text[:60] + ' ...'}"
