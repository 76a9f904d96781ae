"""A row of a dataset -> token ids, on the host."""

from typing import NamedTuple

from rljax.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """A text to learn from: a prompt and what follows it."""

    prompt: list[int]  # begins the text; no decision is taken in it
    completion: list[int]  # what follows, end of turn (EOS) included
    mask: list[bool]  # of `completion`: True on the assistant's own tokens
    columns: dict  # the row


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
    labels: list[float]  # of `completion`: the label on each step end, 0 elsewhere


def prompt_ids(row: dict, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a row's prompt."""
    return tokenizer.encode(row["prompt"])


def demonstration(row: dict, tokenizer: Tokenizer) -> Example:
    """A text to imitate."""
    if "text" in row:
        ids = [*tokenizer.encode(row["text"]), tokenizer.eos]
        return _example(ids[:1], ids[1:], row)
    return _answered(row, row["completion"], tokenizer)


def comparison(row: dict, tokenizer: Tokenizer) -> Comparison:
    """A pair of completions."""
    chosen = _answered(row, row["chosen"], tokenizer)
    rejected = _answered(row, row["rejected"], tokenizer)
    return Comparison(chosen, rejected, row.get("margin"))


def judgment(row: dict, tokenizer: Tokenizer) -> Judgment:
    """A completion and whether it is desirable."""
    return Judgment(demonstration(row, tokenizer), row["label"])


def steps(row: dict, tokenizer: Tokenizer, separator: str = "\n") -> Steps:
    """A solution in steps, each followed by the separator; there is no EOS."""
    completion = []
    step_ends = []
    labels = []
    for step, label in zip(row["completions"], row["labels"], strict=True):
        ids = tokenizer.encode_more(step + separator)
        completion += ids
        step_ends += [False] * (len(ids) - 1) + [True]
        labels += [0.0] * (len(ids) - 1) + [float(label)]
    return Steps(_example(tokenizer.encode(row["prompt"]), completion, row), step_ends, labels)


def _answered(row: dict, completion: str, tokenizer: Tokenizer) -> Example:
    """Prompt and completion of plain text. Where a token would span both, they are encoded one by one."""
    prompt = tokenizer.encode(row["prompt"])
    whole = tokenizer.encode(row["prompt"] + completion)
    ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode_more(completion)
    return _example(prompt, [*ids, tokenizer.eos], row)


def _example(prompt: list[int], completion: list[int], row: dict) -> Example:
    return Example(prompt, completion, [True] * len(completion), row)
