"""Conversations as token ids: the chat template of a model, and which tokens the assistant itself chose.

A conversation is put together as a sampler would see it: for each turn of the assistant the messages before it with the
generation prompt, then what the turn adds, then what comes before the next turn. The assistant's tokens are those from
the end of the generation prompt to the end of the turn: through the first token that stops the sampler, which draws
nothing after it. A template that marks them itself (`{% generation %}`) is followed.

A template may write an earlier turn otherwise than the last one (Qwen3 leaves out its thoughts). Then the turn stands
as it was when it was the last: those are the tokens that were sampled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Messages = Sequence[dict[str, Any]]
Tools = Sequence[Any] | None


class Chat(NamedTuple):
    """The chat template of a tokenizer, as functions."""

    render: Callable[[Messages, Tools, bool], str]  # (messages, tools, with the generation prompt) -> text
    encode: Callable[[str], list[int]]  # rendered text -> ids
    stop: tuple[int, ...]  # ids that end a turn
    eos: str  # the text of the token that ends a text, which some templates write after the last turn
    # (messages, tools) -> ids, and whether each is the assistant's; None: the template does not mark them
    encode_marked: Callable[[Messages, Tools], tuple[list[int], list[bool]]] | None = None


class Piece(NamedTuple):
    """A part of the text of a conversation."""

    text: str
    of_assistant: bool


def encode_prompt(chat: Chat, messages: Messages, tools: Tools = None) -> list[int]:
    """The ids of a conversation with the generation prompt at its end. Raises ValueError where there is none."""
    return chat.encode(_prompt_text(chat, messages, tools))


def encode_conversation(
    chat: Chat, messages: Messages, tools: Tools = None, first: int = 0
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the assistant chose in message `first` or later.

    Raises ValueError where none of these messages is the assistant's, and where the template cannot be followed turn by
    turn.
    """
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError("no message is the assistant's: there is nothing to learn; legal: at least one of that role")
    if chat.encode_marked is None:
        return _encode_pieces(chat, _pieces(chat, messages, tools, first))
    ids, mask = chat.encode_marked(messages, tools)
    if not any(mask):
        raise ValueError("the chat template has {% generation %}, but marks no token of this conversation")
    return ids, mask


def _prompt_text(chat: Chat, messages: Messages, tools: Tools) -> str:
    text = chat.render(messages, tools, True)
    if text == chat.render(messages, tools, False) and not _is_answered_at_once(chat, text, messages, tools):
        raise ValueError("the chat template has no generation prompt: it ignores add_generation_prompt")
    return text


def _is_answered_at_once(chat: Chat, text: str, messages: Messages, tools: Tools) -> bool:
    """Whether the assistant's words follow the rendered messages without a header (Mistral's [/INST])."""
    answered = chat.render([*messages, {"role": "assistant", "content": "word"}], tools, False)
    return answered.startswith(text) and answered[len(text) :].lstrip().startswith("word")


# -------------------------------------------------------------------------------------------------------- turn by turn


def _pieces(chat: Chat, messages: Messages, tools: Tools, first: int) -> list[Piece]:
    """The conversation as pieces of text, those of the assistant from message `first` on apart."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    prompts = [_prompt_text(chat, messages[:i], tools) for i in turns]
    pieces = [Piece(prompts[0], False)]
    for k, i in enumerate(turns):
        turn = _turn_text(chat, messages, tools, prompts[k], i)
        is_last_turn = k + 1 == len(turns)
        if is_last_turn and i + 1 == len(messages):
            return [*pieces, Piece(turn, True)]
        later = chat.render(messages, tools, False) if is_last_turn else prompts[k + 1]
        turn, after = _split_later(chat, prompts[k], turn, later, i)
        pieces += [Piece(turn, True), Piece(after, False)]
    return pieces


def _turn_text(chat: Chat, messages: Messages, tools: Tools, prompt: str, i: int) -> str:
    """What message i adds to the prompt."""
    through = chat.render(messages[: i + 1], tools, False)
    if not through.startswith(prompt):
        raise ValueError(
            f"the chat template does not continue its generation prompt with message {i}, so it cannot be told which "
            "tokens the assistant chose; legal: a template that does, or one with {% generation %}"
        )
    return through[len(prompt) :]


def _split_later(chat: Chat, prompt: str, turn: str, later: str, i: int) -> tuple[str, str]:
    """The turn of message i as it is not the last one, and what `later`, a longer rendering, has after it.

    `later` may have left out the beginning of the turn, and an end of text that stood after it.
    """
    for whole in (turn, turn.removesuffix(chat.eos)):
        for start in range(len(whole.rstrip())):
            written = prompt + whole[start:]
            if later.startswith(written):
                return whole, later[len(written) :]
    raise ValueError(
        f"the chat template writes message {i} in another way once others follow, and its end is not to be found; "
        "legal: a conversation that ends with its only turn of the assistant, or a template with {% generation %}"
    )


# ----------------------------------------------------------------------------------------------------------------- ids


def _encode_pieces(chat: Chat, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for piece, piece_ids in zip(pieces, _ids_of_pieces(chat, pieces), strict=True):
        chosen = _until_stop(piece_ids, chat.stop) if piece.of_assistant else 0
        ids += piece_ids
        mask += [True] * chosen + [False] * (len(piece_ids) - chosen)
    return ids, mask


def _ids_of_pieces(chat: Chat, pieces: Sequence[Piece]) -> list[list[int]]:
    """The ids of the whole text, cut where the pieces end; of each piece by itself where a token crosses such an end.

    A sampler draws what follows the ids of the text so far: these must be the first ids of the whole.
    """
    whole = chat.encode("".join(piece.text for piece in pieces))
    ends = []
    text = ""
    for piece in pieces:
        text += piece.text
        so_far = chat.encode(text)
        if whole[: len(so_far)] != so_far:
            return [chat.encode(piece.text) for piece in pieces]
        ends.append(len(so_far))
    starts = [0, *ends[:-1]]
    return [whole[start:end] for start, end in zip(starts, ends, strict=True)]


def _until_stop(ids: Sequence[int], stop: Sequence[int]) -> int:
    """How many of the ids a sampler draws: through the first that stops it, all where none does."""
    return next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
