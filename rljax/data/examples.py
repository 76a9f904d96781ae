"""A row of a dataset -> token ids, on the host. Which columns a row needs: formats.py."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rljax.data.chat import Chat, encode_after, encode_conversation, prompt_text
from rljax.data.formats import Row, is_conversational, messages_of, text_of
from rljax.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """A text to learn from: a prompt and what follows it."""

    prompt: list[int]  # begins the text; no decision is taken in it
    completion: list[int]  # what follows, end of turn (EOS) included
    mask: list[bool]  # of `completion`: True on the assistant's own tokens
    columns: Mapping[str, Any]  # the row


class Comparison(NamedTuple):
    """Two completions of one prompt, the better one first."""

    chosen: Example
    rejected: Example  # has the same prompt
    margin: float | None


class Judgment(NamedTuple):
    """A completion that is judged by itself."""

    example: Example
    desirable: bool


class Steps(NamedTuple):
    """A solution whose steps are labeled."""

    example: Example
    step_ends: list[bool]  # of `completion`: True on the last token of a step
    labels: list[float]  # of `completion`: the label on each step end, NaN where it has none; 0 elsewhere


def prompt_ids(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The ids of a row's `prompt`, or of its `messages` without the assistant's last turn.

    A conversation ends with the generation prompt. Raises ValueError where there is none, and for an empty prompt.
    """
    text, encode = _prompt(row, tokenizer)
    ids = encode(text)
    if not ids:
        raise ValueError("the prompt is empty: it has no tokens")
    return ids


def _prompt(row: Row, tokenizer: Tokenizer) -> tuple[str, Callable[[str], list[int]]]:
    """The text of a row's prompt, and what makes ids of it: a chat template writes its special tokens itself."""
    if "prompt" not in row and "messages" in row:
        messages = before_last_turn(messages_of(row, "messages"))
    elif is_conversational(row, "prompt"):
        messages = messages_of(row, "prompt")
        if messages[-1]["role"] == "assistant":
            raise ValueError("column 'prompt' ends with a message of the assistant; legal: one that it can answer")
    else:
        return row["prompt"], tokenizer.encode
    return prompt_text(_chat(tokenizer), messages, _tools(row)), tokenizer.encode_more


def _chat(tokenizer: Tokenizer) -> Chat:
    if tokenizer.chat is None:
        raise ValueError("a conversation, but the model has no chat template; legal: texts, or a model that has one")
    return tokenizer.chat


def prompt_of(row: Row) -> str | list[dict]:
    """The prompt of a row as the row has it: a text, or the messages that a model answers."""
    return row["prompt"] if "prompt" in row else before_last_turn(row["messages"])


def answer(prompt: str | list[dict], text: str) -> str | list[dict]:
    """A text that answers a prompt, in the form of the prompt: of a conversation a message of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def before_last_turn(messages: list[dict]) -> list[dict]:
    """The messages before those of the assistant that end the conversation."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def demonstration(row: Row, tokenizer: Tokenizer) -> Example:
    """A text to imitate, from `prompt` and `completion`, from `messages`, or from `text`.

    Of a conversation the assistant's turns are learned; of messages all of them.
    """
    if "completion" in row or not {"messages", "text"} & set(row):
        return _answered(row, "completion", tokenizer)
    if "messages" in row:
        ids, mask = encode_conversation(_chat(tokenizer), messages_of(row, "messages"), _tools(row))
        start = mask.index(True)
        return Example(ids[:start], ids[start:], mask[start:], row)
    if not text_of(row, "text"):
        raise ValueError("column 'text' is empty: there is nothing to learn")
    ids = _with_eos(tokenizer.encode(row["text"]), tokenizer)
    added = len(ids) - len(_with_eos(tokenizer.encode_more(row["text"]), tokenizer))
    start = max(added, 1)  # the first token follows nothing: no decision
    return _example(ids[:start], ids[start:], row)


def comparison(row: Row, tokenizer: Tokenizer) -> Comparison:
    """The completions `chosen` and `rejected` of a `prompt`; without one it is what both begin with.

    `ended`, where the row has it, says of each of both whether it ended by itself (`as_ended`).
    """
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not _is_finite(margin)):
        raise ValueError(f"column 'margin' is {margin!r}; legal: a finite number")
    if "prompt" in row:
        is_conversational(row, "prompt", "chosen", "rejected")
        pair = [_answered(row, column, tokenizer) for column in ("chosen", "rejected")]
    elif is_conversational(row, "chosen", "rejected"):
        texts = [messages_of(row, column) for column in ("chosen", "rejected")]
        shared = _common_length(*texts)
        others = [messages[shared]["role"] for messages in texts if messages[shared]["role"] != "assistant"]
        if others:
            raise ValueError(
                f"no column 'prompt', and chosen and rejected part at message {shared + 1} ({others[0]}): they answer "
                "different prompts; legal: to part at a message of the assistant"
            )
        pair = [_conversation(row, messages, shared, tokenizer) for messages in texts]
    else:
        pair = _after_common_prompt(row, tokenizer)
    chosen, rejected = as_ended(row, pair, tokenizer)
    return Comparison(chosen, rejected, None if margin is None else float(margin))


def gold(row: Row, tokenizer: Tokenizer) -> Example:
    """The column `gold` of a comparison: a third completion of its prompt, to be imitated."""
    return demonstration({**row, "completion": row["gold"]}, tokenizer)


def ranking(row: Row, tokenizer: Tokenizer) -> list[Example]:
    """The `completions` of a `prompt`, best first; `ended`, where the row has it, is of these (`as_ended`).

    Raises ValueError for fewer than two completions.
    """
    completions = row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError(f"column 'completions' is {completions!r}; legal: a list of at least two, best first")
    rest = {name: value for name, value in row.items() if name != "completions"}
    found = [demonstration(rest | {"completion": completion}, tokenizer) for completion in completions]
    return as_ended(row, found, tokenizer)


def as_ended(row: Row, completions: Sequence[Example], tokenizer: Tokenizer) -> list[Example]:
    """The completions of a row; those that its column `ended` says were cut have no end of turn.

    Raises ValueError where `ended` is not one of true or false for each completion.
    """
    ended = row.get("ended", [True] * len(completions))
    if not (isinstance(ended, list) and len(ended) == len(completions) and all(type(one) is bool for one in ended)):
        raise ValueError(f"column 'ended' is {ended!r}; legal: a list of true and false, one for each completion")
    pairs = zip(completions, ended, strict=True)
    return [example if has_end else without_end(example, tokenizer) for example, has_end in pairs]


def without_end(example: Example, tokenizer: Tokenizer) -> Example:
    """The example without the token that ends its completion, unless that is all of it."""
    if len(example.completion) < 2 or example.completion[-1] not in tokenizer.stop:
        return example
    return example._replace(completion=example.completion[:-1], mask=example.mask[:-1])


def judgment(row: Row, tokenizer: Tokenizer) -> Judgment:
    """The `completion` of a `prompt`, and its `label`: whether it is desirable."""
    if row.get("label") not in (True, False):
        found = repr(row["label"]) if "label" in row else "missing"
        raise ValueError(f"column 'label' is {found}; legal: true or false")
    return Judgment(_answered(row, "completion", tokenizer), bool(row["label"]))


def steps(row: Row, tokenizer: Tokenizer, separator: str = "\n") -> Steps:
    """The steps `completions` of a solution, each followed by the separator, and their `labels` (null: no label).

    In a conversation the steps are assistant's messages that make one turn. There is no EOS: more steps may follow.
    """
    texts = _step_texts(row)
    labels = _step_labels(row, len(texts))
    prompt = prompt_ids(row, tokenizer)
    before, encode = _prompt(row, tokenizer)
    completion: list[int] = []
    step_ends: list[bool] = []
    label_of_token: list[float] = []
    for text, label in zip(texts, labels, strict=True):
        ids = encode_after(before, text + separator, encode, tokenizer.encode_more)
        if not ids:
            raise ValueError("a step is empty: it has no tokens")
        completion += ids
        step_ends += [False] * (len(ids) - 1) + [True]
        label_of_token += [0.0] * (len(ids) - 1) + [label]
        before += text + separator
    return Steps(_example(prompt, completion, row), step_ends, label_of_token)


def _step_texts(row: Row) -> list[str]:
    if "prompt" in row and is_conversational(row, "prompt"):
        return [message["content"] for message in messages_of(row, "completions")]
    texts = row.get("completions")
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError("column 'completions' holds no list of texts; legal: the steps, one text each")
    return texts


def _step_labels(row: Row, count: int) -> list[float]:
    labels = row.get("labels")
    if not isinstance(labels, list) or len(labels) != count:
        found = f"{len(labels)} values" if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise ValueError(f"column 'labels' is {found} for {count} steps; legal: a list of one label a step")
    if not all(label is None or (_is_finite(label) and 0 <= label <= 1) for label in labels):
        raise ValueError(
            f"column 'labels' is {labels!r}; legal: true, false, numbers from 0 to 1, or null for no label (ratings of "
            "-1, 0 and 1, as PRM800K has them, are to be mapped first)"
        )
    return [math.nan if label is None else float(label) for label in labels]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _answered(row: Row, column: str, tokenizer: Tokenizer) -> Example:
    """The prompt and what stands in the column, which answers it."""
    if is_conversational(row, "prompt", column):
        prompt = messages_of(row, "prompt")
        return _conversation(row, [*prompt, *messages_of(row, column)], len(prompt), tokenizer)
    prompt = prompt_ids(row, tokenizer)
    ids = encode_after(row["prompt"], row[column], tokenizer.encode, tokenizer.encode_more)
    return _example(prompt, _with_eos(ids, tokenizer), row)


def _conversation(row: Row, messages: list[dict], first: int, tokenizer: Tokenizer) -> Example:
    """A conversation to the end of its last turn; what the assistant says from message `first` on is learned."""
    ids, mask = encode_conversation(_chat(tokenizer), messages, _tools(row), first)
    start = mask.index(True)
    end = len(mask) - mask[::-1].index(True)
    return Example(ids[:start], ids[start:end], mask[start:end], row)


def _after_common_prompt(row: Row, tokenizer: Tokenizer) -> tuple[Example, Example]:
    """Two texts as completions of the tokens that both begin with."""
    texts = [_with_eos(tokenizer.encode(row[column]), tokenizer) for column in ("chosen", "rejected")]
    shared = _common_length(*texts)
    if not shared:
        raise ValueError("no column 'prompt', and chosen and rejected begin with different tokens")
    chosen, rejected = (_example(ids[:shared], ids[shared:], row) for ids in texts)
    return chosen, rejected


def _common_length(one: Sequence, other: Sequence) -> int:
    """The length of the longest common beginning that leaves something of both."""
    shortest = min(len(one), len(other)) - 1
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos is None:
        raise ValueError("the tokenizer has no EOS token: a model would never learn to stop")
    return ids if ids and ids[-1] == tokenizer.eos else [*ids, tokenizer.eos]


def _example(prompt: list[int], completion: list[int], row: Row) -> Example:
    return Example(prompt, completion, [True] * len(completion), row)


def _tools(row: Row) -> list | None:
    """The row's tools: a list of JSON schemas, or that list as a string."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools' is a string that is not JSON ({error})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"column 'tools' is a {type(tools).__name__}; legal: a list of JSON schemas")
    return tools or None
