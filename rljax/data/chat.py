"""Conversations as token ids: prompts to sample from, and assistant's turns to learn from.

Of a turn exactly those tokens are learned from that a sampler would draw: from the end of the generation prompt to the
first stop token. A turn is found as the difference of two renderings, the messages before it with the generation prompt
and the messages with it; a template that marks turns with {% generation %} is taken at its word.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Messages = Sequence[dict[str, Any]]
Tools = Sequence[Any] | None

MARK = "\N{REFERENCE MARK}\N{ASTERISM}\N{REFERENCE MARK}"  # stands for a message; no template changes it


class Chat(NamedTuple):
    """The chat template of a tokenizer, as functions; what it refuses is a ValueError."""

    name: str  # whose template it is, for error messages
    render: Callable[[Messages, Tools, bool], str]  # (messages, tools, with the generation prompt) -> text
    encode: Callable[[str], list[int]]  # rendered text -> ids
    ends: tuple[str, ...]  # texts of the tokens that end a turn, and stop a sampler
    end_of_turn: int | None  # the one of them with which the template ends the assistant's turns
    has_generation_prompt: bool  # or needs none: its turns have no header
    # (messages, tools) -> text, and the spans in it that are the assistant's; None: the template does not mark them
    spans: Callable[[Messages, Tools], tuple[str, list[tuple[int, int]]]] | None = None


class Piece(NamedTuple):
    """A part of the text of a conversation."""

    text: str
    of_assistant: bool


def encode_prompt(chat: Chat, messages: Messages, tools: Tools = None) -> list[int]:
    """The ids of a conversation with the generation prompt at its end. Raises ValueError where there is none."""
    return chat.encode(prompt_text(chat, messages, tools))


def prompt_text(chat: Chat, messages: Messages, tools: Tools = None) -> str:
    """The text of a conversation with the generation prompt at its end. Raises ValueError where there is none."""
    if not chat.has_generation_prompt:
        raise ValueError(
            f"the chat template of {chat.name} has no generation prompt: it ignores add_generation_prompt, "
            "though the assistant's turns begin with a header"
        )
    return chat.render(messages, tools, True)


def encode_conversation(
    chat: Chat, messages: Messages, tools: Tools = None, first: int = 0
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the assistant chose in message `first` or later.

    Raises ValueError where none of these messages is the assistant's, and where the template cannot be followed turn by
    turn.
    """
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError("no message is the assistant's: there is nothing to learn; legal: at least one of that role")
    make_pieces = _pieces if chat.spans is None else _marked_pieces
    ids: list[int] = []
    mask: list[bool] = []
    before = ""
    for piece in make_pieces(chat, messages, tools, first):
        new = encode_after(before, piece.text, chat.encode, chat.encode)
        ids += new
        mask += [piece.of_assistant] * len(new)
        before += piece.text
    return ids, mask


def encode_reply(chat: Chat, messages: Messages, turn_ended: bool, reply: Messages, tools: Tools = None) -> list[int]:
    """The ids that follow a turn as it was sampled: the rest of its end, the messages of a reply, generation prompt.

    They are the template's own continuation: the difference of two renderings. No token that was sampled is encoded
    again, as in a dialogue with the model.

    Args:
      messages: of the conversation before the turn. turn_ended: it ended with a stop token; else that is written here.
      reply: messages of other roles than the assistant's.
    """
    known = [{**message, "content": message["content"].replace(MARK, "")} for message in messages]
    shown = [*known, {"role": "assistant", "content": MARK}, *reply]
    after = prompt_text(chat, shown, tools).partition(MARK)[2]
    end = (_end_of_turn(after, chat) or 0) if turn_ended else 0
    return encode_after(after[:end], after[end:], chat.encode, chat.encode)


def takes_role(chat: Chat, role: str) -> bool:
    """Whether the template writes messages of this role after a turn of the assistant."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    try:
        return "4217" in prompt_text(chat, [*turns, {"role": role, "name": "tool", "content": "4217"}])
    except ValueError:
        return False


def ignores_tools(chat: Chat) -> bool:
    """Whether the template writes the same text with tools and without them."""
    function = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
    question = [{"role": "user", "content": MARK}]
    try:
        with_tools = chat.render(question, [{"type": "function", "function": function}], False)
        return with_tools == chat.render(question, None, False)
    except ValueError:  # what it refuses, the first row that has it meets
        return False


def encode_after(
    before: str, text: str, encode: Callable[[str], list[int]], encode_more: Callable[[str], list[int]]
) -> list[int]:
    """The ids of a text after another, as both are encoded together.

    Where a token would span both, the text's own ids: after the ids of `before` no sampler draws such a token.
    """
    head = encode(before)
    whole = encode(before + text)
    return whole[len(head) :] if whole[: len(head)] == head else encode_more(text)


def _marked_pieces(chat: Chat, messages: Messages, tools: Tools, first: int) -> list[Piece]:
    """The conversation as pieces of text; those that the template marks are the assistant's."""
    text, spans = chat.spans(messages, tools)
    if first:
        spans = spans[len(chat.spans(messages[:first], tools)[1]) :]
    spans = [(left, right) for left, right in spans if left < right]
    if not spans:
        raise ValueError(
            f"the chat template of {chat.name} has {{% generation %}}, but marks nothing of this conversation"
        )
    pieces = []
    end = 0
    for left, right in spans:
        pieces += [Piece(text[end:left], False), Piece(text[left:right], True)]
        end = right
    return [*pieces, Piece(text[end:], False)]


# -------------------------------------------------------------------------------------------------------- turn by turn


def _pieces(chat: Chat, messages: Messages, tools: Tools, first: int) -> list[Piece]:
    """The conversation as pieces of text, the assistant's turns from message `first` on apart.

    A template may write a turn otherwise once other messages follow it (Qwen3's leaves out its thoughts). Then the text
    goes on as it would in a dialogue with the model: its turns stay as they were drawn.
    """
    pieces: list[Piece] = []
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    for i, before in zip(turns, [None, *turns], strict=False):
        prompt = prompt_text(chat, messages[:i], tools)
        pieces.append(Piece(_continued(chat, pieces, prompt, messages[:i], tools, before, True), False))
        turn = _turn(chat, messages[: i + 1], prompt, tools)
        pieces.append(Piece(turn, True))
    whole = chat.render(messages, tools, False)
    pieces.append(Piece(_continued(chat, pieces, whole, messages, tools, turns[-1], False), False))
    return pieces


def _continued(
    chat: Chat,
    pieces: Sequence[Piece],
    longer: str,
    messages: Messages,
    tools: Tools,
    last: int | None,
    with_prompt: bool,
) -> str:
    """What a longer rendering has after the pieces, of which the last is the turn of message `last`."""
    so_far = "".join(piece.text for piece in pieces)
    if longer.startswith(so_far):
        return longer[len(so_far) :]
    shown = [*messages[:last], {"role": "assistant", "content": MARK}, *messages[last + 1 :]]
    after = chat.render(shown, tools, with_prompt).rpartition(MARK)[2]
    return after[_end_of_turn(after, chat) or 0 :]


def _turn(chat: Chat, messages: Messages, prompt: str, tools: Tools) -> str:
    """The text of the last message's turn, through the first token in it that stops a sampler."""
    whole = chat.render(messages, tools, False)
    number = len(messages)
    if not whole.startswith(prompt):
        raise ValueError(
            f"the chat template of {chat.name} does not continue its generation prompt with message {number} "
            "(assistant), so it cannot be told which tokens the assistant chose; legal: a template that does, or one "
            "with {% generation %}"
        )
    turn = whole[len(prompt) :]
    end = _end_of_turn(turn, chat)
    if end is None:
        raise ValueError(
            f"the chat template of {chat.name} ends message {number} (assistant) with no token that stops a sampler: "
            "a model that learns from it would never stop"
        )
    rest = turn[end:]
    for text in chat.ends:
        rest = rest.replace(text, "")
    if rest.strip():
        raise ValueError(f"message {number} (assistant) holds {turn[:end][-20:]!r}, at which a sampler stops")
    return turn[:end]


def _end_of_turn(text: str, chat: Chat) -> int | None:
    """Where the first token has ended that stops a sampler; None where there is none."""
    found = [text.index(end) + len(end) for end in chat.ends if end in text]
    return min(found, default=None)
