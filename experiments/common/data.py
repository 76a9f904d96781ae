"""Rows, prompts and tokenizers, as a recipe's settings name them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.common.rows import (
    Found,
    Read,
    examples_in,
    is_tie,
    limits_text,
    make_shape,
    read_rows,
    shorten,
    split_keys,
)
from experiments.common.settings import Data, Rows
from rljax.data.examples import Example, demonstration, prompt_ids
from rljax.data.files import Table, read_table
from rljax.data.prompts import Prompts, shuffled_indices, train_eval_split
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import hf
from rljax.train import distributed
from rljax.train.log import log_info

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer_and_context(directory: str) -> tuple[Tokenizer, int]:
    """The tokenizer of a model directory, of a reward model's too, and how many tokens the model can read."""
    config = hf.read_config(directory, reward_model=True)
    return load_tokenizer(directory, config.vocab_size), config.max_positions


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    """The bytes of each of the model's ids; empty for ids that the tokenizer lacks."""
    known = tokenizer.token_bytes()
    return known + [b""] * (vocabulary - len(known))


# ------------------------------------------------------------------------------------------------ files, split, mixture


class Files(NamedTuple):
    """The files that a setting names, read."""

    paths: list[str]
    weights: list[float]  # the share of each; all 0 where none is given
    tables: list[Table]


def read_files(names: str | Sequence[str]) -> Files:
    """The files FILE or FILE=WEIGHT. Raises ValueError for weights of some only, and for a file named twice."""
    names = [names] if isinstance(names, str) else names
    paths, weights = map(list, zip(*map(split_weight, names), strict=True))
    twice = [path for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; legal: once, FILE=WEIGHT for a larger share of the draws")
    if any(weights) and not all(weights):
        raise ValueError(f"weights for some files only ({', '.join(names)}); legal: FILE=WEIGHT for all or for none")
    return Files(paths, weights, [read_table(path) for path in paths])


class Examples(NamedTuple):
    """What was read from the rows, to train on and to evaluate on."""

    train: list
    eval: list


def read_examples(settings: Data, read: Read, tokenizer: Tokenizer, context: int, seed: int) -> Examples:
    """read(row, tokenizer) of the rows of all files, split by prompt; files with weights have that share of `train`.

    Raises ValueError, with file and line, for a row that cannot be read.
    """
    if not settings.files:
        raise ValueError("which rows? legal: --data.files FILE.jsonl, and more of them")
    max_tokens = settings.max_tokens or context
    max_prompt_tokens = settings.max_prompt_tokens or max_tokens
    if not 0 < max_tokens <= context or not 0 < max_prompt_tokens <= max_tokens:
        raise ValueError(
            f"data.max_tokens = {settings.max_tokens}, max_prompt_tokens = {settings.max_prompt_tokens} (0: the most); "
            f"legal: at most the model's context, {context}, with room for a completion"
        )
    shape = make_shape(settings.template, settings.completion, settings)
    limits = (settings.overlong, max_prompt_tokens, max_tokens)
    files = read_files(settings.files)
    found = read_and_split(files, shape, read, tokenizer, limits, settings.eval_size, seed)
    return Examples(*([one.item for one in side] for side in found))


def read_and_split(
    files: Files,
    shape: Callable[[dict], dict],
    read: Read,
    tokenizer: Tokenizer,
    limits: tuple[str, int, int],
    eval_size: int,
    seed: int,
    what: str = "rows",
) -> tuple[list[Found], list[Found]]:
    """The rows of the files in (training, evaluation). What was dropped, cut and found twice is counted in one line.

    Args: limits: overlong, max_prompt_tokens and max_tokens of `shorten`.
    """
    parts = [read_rows(table, shape, read, tokenizer) for table in files.tables]
    file_of = [number for number, part in enumerate(parts) for _ in part]
    source = {one.place: number for number, one in zip(file_of, (one for part in parts for one in part), strict=True)}
    fitting, dropped, cut = shorten([one for part in parts for one in part], *limits, what)
    kept = [one for one in fitting if not is_tie(one.item)]
    if not kept:
        raise ValueError(f"the completions of every one of {len(fitting)} rows are equal: there is nothing to learn")
    keys = split_keys(kept)
    split = train_eval_split(keys, eval_size, seed)
    train, evaluation = ([kept[i] for i in side] for side in split)
    repeated = len(keys) - len(set(keys))
    evaluated = f"{len({keys[i] for i in split[1]})} of {len(set(keys))} prompts"
    option = "--eval_prompts" if what == "prompts" else "--data.eval_size"
    notes = [
        f"{dropped} dropped, longer than {limits_text(*limits[1:])}",
        *([f"{cut} cut to that ({limits[0]})"] if cut else []),
        *([f"{len(fitting) - len(kept)} left out, whose completions are equal"] if len(kept) < len(fitting) else []),
        *([f"{repeated} repeat the prompt of another, and are on its side: {evaluated} held out"] if repeated else []),
        *([f"all have one prompt: the same {what} train and evaluate"] if len(set(keys)) == 1 else []),
        *([f"{option} says how many to hold out"] if 2 * len(evaluation) >= len(train) else []),
    ]
    log_info(f"{len(train)} {what} to train on, {len(evaluation)} to evaluate on; {'; '.join(notes)}")
    if any(files.weights):
        sides = [[one for one in train if source[one.place] == number] for number in range(len(parts))]
        train = mixed(sides, files.weights, files.paths, seed)
    _agree_on_rows(what, train, evaluation)
    return train, evaluation


def _agree_on_rows(what: str, *sides: Sequence[Found]) -> None:
    """Raise RuntimeError on every process of a run where one of them read other rows."""
    if distributed.process_count() > 1:
        texts = (repr((one.place, one.item)).encode() for side in sides for one in side)
        digest = hashlib.sha256(b"\n".join(texts)).hexdigest()[:16]
        distributed.agree({f"number of {what}": sum(map(len, sides)), f"sha256 of the {what}": digest})


def split_weight(text: str) -> tuple[str, float]:
    """(file, weight) of FILE=WEIGHT; weight 0 where there is none."""
    path, equals, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        return text, 0.0
    if not equals:
        return text, 0.0
    if not (path and 0 < value < math.inf):
        raise ValueError(f"{text}: the weight of a file must be a positive number")
    return path, value


def name_of(files: str | Sequence[str]) -> str:
    """What the directory of a run is called after: the name of the first file."""
    first = files if isinstance(files, str) else files[0]
    path, _ = split_weight(first)
    name = Path(path).name.removesuffix(".gz")
    return Path(name).stem.replace(":", "-")


def mixed(parts: Sequence[list], weights: Sequence[float], names: Sequence[str], seed: int) -> list:
    """The rows of all parts, those of each part so often that its share of all is its weight's share; none is left out.

    The order of draws over this list is that of any list: a pure function of seed and cursor.
    """
    if not all(parts):
        raise ValueError(f"{names[[bool(part) for part in parts].index(False)]}: no row is left to train on")
    shares = np.asarray(weights) / sum(weights)
    total = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    if total > 100 * sum(map(len, parts)):
        raise ValueError(
            f"weights {list(weights)} would repeat rows {total / sum(map(len, parts)):.0f} times on average"
        )
    rows = []
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        indices = shuffled_indices(len(part), seed + number, 0, round(total * share))
        rows += [part[i] for i in indices]
    return rows


def report_padding(lengths: Sequence[int], width: int, what: str, advice: str) -> None:
    """Where more than half of what is computed is padding, one line says so, and what helps where few rows are so long.

    Args:
      lengths: tokens of each row. width: of every row of a batch, which is that of the longest.
      advice: what makes rows narrower, with {} for the tokens that 99 % of them have at most.
    """
    padding = 1 - np.mean(lengths) / width
    if padding > 0.5:
        most = int(np.quantile(lengths, 0.99, method="higher"))
        helps = f". 99 % of them have at most {most}: {advice.format(most)}" if 2 * most <= width else ""
        log_info(f"batches of {what} are as wide as the longest needs, {width} tokens: {padding:.0%} is padding{helps}")


def draw(examples: Sequence[T], seed: int, cursor: int, count: int) -> list[T]:
    """The next `count` examples of the shuffled order from draw number `cursor` on: a pure function."""
    return [examples[i] for i in shuffled_indices(len(examples), seed, int(cursor), count)]


# ------------------------------------------------------------------------------------------------------------- prompts


def max_prompt_length(wanted: int, max_completion: int, context: int) -> int:
    """Tokens that a prompt may have: `wanted`, or where that is 0 all of the context that a completion leaves."""
    room = context - max_completion
    longest = wanted or room
    if not 0 < longest <= room:
        raise ValueError(
            f"max_prompt_tokens = {wanted} and sampling.max_tokens = {max_completion} do not fit the model's context; "
            f"legal: a sum of at most {context}, with room for a prompt"
        )
    return longest


def read_prompt(row: dict, tokenizer: Tokenizer) -> Example:
    """A prompt that is yet to be answered."""
    return Example(prompt_ids(row, tokenizer), [], [], row)


class AnsweredPrompt(NamedTuple):
    """A prompt with the completion that its row has."""

    prompt: Example
    completion: list[int]


def read_answered_prompt(row: dict, tokenizer: Tokenizer) -> AnsweredPrompt:
    """A prompt, and the `completion` that its row has. Raises ValueError where it has none."""
    if row.get("completion") is None:
        raise ValueError("no column 'completion'; legal: with one, or --on_policy_fraction 1")
    return AnsweredPrompt(read_prompt(row, tokenizer), demonstration(row, tokenizer).completion)


def read_prompts(
    files: Files,
    template: str,
    tokenizer: Tokenizer,
    max_tokens: int,
    eval_prompts: int,
    seed: int,
    settings: Rows,
    read: Read = read_prompt,
) -> tuple[Prompts, Prompts]:
    """Prompts to train on and to evaluate on; what becomes of those of more than `max_tokens` is counted.

    read: `read_prompt`, or `read_answered_prompt` where the file's completions are learned from too.
    """
    shape = make_shape(template, "", settings)
    limits = (settings.overlong, max_tokens, max_tokens)
    sides = read_and_split(files, shape, read, tokenizer, limits, eval_prompts, seed, "prompts")
    train, evaluation = (as_prompts(side, tokenizer, max_tokens, seed) for side in sides)
    return train, evaluation


def read_all_prompts(
    files: Files,
    shape: Callable[[dict], dict],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    overlong: str = "drop",
) -> Prompts:
    """The prompts of all files, none of them held out; what becomes of those of more than `max_tokens` is counted.

    Raises ValueError for weights, which mean nothing where every prompt is taken once.
    """
    if any(files.weights):
        weighted = f"{files.paths[0]}={files.weights[0]:g}"
        raise ValueError(f"{weighted}: every prompt is taken once; legal: FILE without a weight")
    found = [one for table in files.tables for one in read_rows(table, shape, read_prompt, tokenizer)]
    kept, dropped, cut = shorten(found, overlong, max_tokens, max_tokens, "prompts")
    notes = f"{dropped} dropped, longer than {max_tokens} tokens" + f"; {cut} cut to that ({overlong})" * bool(cut)
    log_info(f"{len(kept)} prompts; {notes}")
    _agree_on_rows("prompts", kept)
    return as_prompts(kept, tokenizer, max_tokens, seed)


def as_prompts(found: Sequence[Found], tokenizer: Tokenizer, max_tokens: int, seed: int = 0) -> Prompts:
    """Prompts that were read, with the columns that their file has, and what was made of these."""
    prompts = [next(examples_in(one.item)) for one in found]
    completions = [one.item.completion for one in found] if isinstance(found[0].item, AnsweredPrompt) else None
    columns = [one.row for one in found]
    shaped = [prompt.columns for prompt in prompts]
    encoded = [prompt.prompt for prompt in prompts]
    return Prompts(columns, encoded, max_tokens, seed, tokenizer.pad, shaped, completions)
