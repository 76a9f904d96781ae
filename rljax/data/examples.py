"""A row of a dataset as token ids, on the host. Its columns have the names of TRL's dataset formats (`data.formats`).

A completion begins where the sampler would begin: the ids of its prompt are those that are sampled after, and what
follows is encoded so that the prompt's ids stay as they are. It ends with the token that ends a text (EOS), or with
what the chat template writes at the end of a turn.

The errors say which column is wrong; which file and line, says who reads the file (`files.Table.place`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rljax.data.chat import encode_conversation, encode_prompt
from rljax.data.formats import Row, is_conversational, messages_of, text_of
from rljax.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """A text to learn from: a prompt and what follows it."""

    prompt: list[int]  # begins the text; no decision is taken in it
    completion: list[int]  # what follows, end of turn (EOS) included
    mask: list[bool]  # of `completion`: True on the assistant's own tokens
    columns: Mapping[str, Any]  # the row


class Comparison(NamedTuple):
    """Two completions of one prompt."""

    chosen: Example
    rejected: Example
    margin: float | None  # by how much the chosen one is better, if it was rated


class Judgment(NamedTuple):
    """A completion that is judged by itself."""

    example: Example
    desirable: bool


class Steps(NamedTuple):
    """A completion of several steps, each of them labeled. Both lists are as long as the completion."""

    example: Example
    step_ends: list[bool]  # True on the last token of a step
    labels: list[float]  # of the step that ends there: 1 right, 0 wrong; 0 elsewhere


def prompt_ids(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The ids of the column `prompt`, or of `messages` up to the last turn of the assistant, ready to be completed."""
    column = "prompt" if "prompt" in row else "messages"
    if not is_conversational(row):
        return tokenizer.encode(text_of(row, column))
    messages = messages_of(row, column)
    if column == "messages" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return encode_prompt(_chat(tokenizer), messages, row.get("tools"))


def demonstration(row: Row, tokenizer: Tokenizer) -> Example:
    """A text to imitate: of the columns text, messages, or prompt and completion."""
    if "completion" in row:
        return _completed(row, "completion", tokenizer)
    if is_conversational(row):
        ids, mask = encode_conversation(_chat(tokenizer), messages_of(row, "messages"), row.get("tools"))
        start = mask.index(True)
        return Example(ids[:start], ids[start:], mask[start:], row)
    ids = [*tokenizer.encode(text_of(row, "text")), *_eos(tokenizer)]
    return Example(ids[:1], ids[1:], [True] * (len(ids) - 1), row)


def comparison(row: Row, tokenizer: Tokenizer) -> Comparison:
    """Two completions, of the columns chosen and rejected.

    Without a column `prompt` the prompt is what both begin with: the messages they share, or the tokens.
    """
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise ValueError(f"column 'margin' holds {margin!r}; legal: a number")
    row = row if "prompt" in row else _with_prompt(row)
    chosen = _completed(row, "chosen", tokenizer)
    rejected = _completed(row, "rejected", tokenizer)
    return Comparison(chosen, rejected, None if margin is None else float(margin))


def judgment(row: Row, tokenizer: Tokenizer) -> Judgment:
    """A completion and its label."""
    label = row.get("label")
    if not isinstance(label, bool):
        raise ValueError(f"column 'label' holds {label!r}; legal: true (desirable) or false")
    return Judgment(_completed(row, "completion", tokenizer), label)


def steps(row: Row, tokenizer: Tokenizer, separator: str = "\n") -> Steps:
    """A completion whose steps, of the column `completions`, are joined by the separator; `labels` has one for each."""
    texts = row.get("completions")
    labels = row.get("labels")
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("column 'completions' holds no list of texts; legal: the steps, one text each")
    if not isinstance(labels, Sequence) or len(labels) != len(texts) or not texts:
        raise ValueError(f"{len(texts)} steps, and labels {labels!r}; legal: at least one step, each with a label")
    prompt = tokenizer.encode(text_of(row, "prompt"))
    completion: list[int] = []
    step_ends: list[bool] = []
    values: list[float] = []
    for text, label in zip(texts, labels, strict=True):
        ids = tokenizer.encode_more(text + separator)
        if not ids:
            raise ValueError("column 'completions' has a step without a token; legal: texts")
        completion += ids
        step_ends += [False] * (len(ids) - 1) + [True]
        values += [0.0] * (len(ids) - 1) + [float(label)]
    return Steps(Example(prompt, completion, [True] * len(completion), row), step_ends, values)


# ------------------------------------------------------------------------------------------------------------- private


def _completed(row: Row, column: str, tokenizer: Tokenizer) -> Example:
    """The prompt of a row, and what the column adds to it."""
    if not is_conversational(row):
        prompt = tokenizer.encode(text_of(row, "prompt"))
        ids = _continuation(prompt, text_of(row, "prompt"), text_of(row, column), tokenizer)
        completion = [*ids, *_eos(tokenizer)]
        return Example(prompt, completion, [True] * len(completion), row)
    before = messages_of(row, "prompt")
    added = messages_of(row, column)
    chat = _chat(tokenizer)
    prompt = encode_prompt(chat, before, row.get("tools"))
    ids, mask = encode_conversation(chat, [*before, *added], row.get("tools"), first=len(before))
    if ids[: len(prompt)] != prompt:
        raise ValueError(f"the chat template writes the prompt otherwise once column {column!r} follows it")
    return Example(prompt, ids[len(prompt) :], mask[len(prompt) :], row)


def _continuation(prompt: list[int], prompt_text: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text that follows a prompt, whose own ids stay as they are.

    Where a token would cross the border the text is encoded after a new line, so that a tokenizer that puts a space
    before every text puts none before this one.
    """
    whole = tokenizer.encode(prompt_text + text)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    line = tokenizer.encode_more("\n")
    after_line = tokenizer.encode_more("\n" + text)
    if after_line[: len(line)] == line:
        return after_line[len(line) :]
    return tokenizer.encode_more(text)


def _with_prompt(row: Row) -> Row:
    """A preference without a prompt, with what both of its texts begin with as the prompt."""
    if not is_conversational(row):
        raise ValueError("chosen and rejected are texts without a column 'prompt'; legal: with one, or conversations")
    chosen = messages_of(row, "chosen")
    rejected = messages_of(row, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 or shared == len(chosen) or shared == len(rejected):
        raise ValueError("chosen and rejected share no beginning, or one is all of the other; legal: a common prompt")
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _chat(tokenizer: Tokenizer):
    if tokenizer.chat is None:
        raise ValueError("a conversation, but the model has no chat template; legal: texts")
    return tokenizer.chat


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos is None else [tokenizer.eos]
