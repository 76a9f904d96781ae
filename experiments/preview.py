r"""Rows of a file as the model sees them: tokens, which of them are learned, lengths, and what is dropped and why.

    python experiments/preview.py --model DIR --data.files demonstrations.jsonl
    python experiments/preview.py --model DIR --data.files gsm8k_train.jsonl --kind prompt \
        --data.template "{question}\nAnswer:" --data.chat --rows 3
    python experiments/preview.py --model DIR --data.files pairs.jsonl --json > rows.jsonl

The settings are those of the scripts that learn from rows (docs/data.md). On a terminal the tokens are colored: green
ones are learned, dim ones are read only. In a pipe each text is one line, what is learned in brackets, and its ids and
mask (1: learned); with --json the ids and the mask. All rows are counted, --rows of them are shown; of rows that cannot
be read for the same reason the first is. DIR needs no more than a tokenizer.

Reached: the ids of 39 recorded conversations under five chat templates, as TRL 1.16 trains on (tests/test_preview.py).
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.text import Text

from experiments.common import command_line, data, hub
from experiments.common.rows import (
    CUTS,
    Found,
    Read,
    Unread,
    is_overlong,
    is_tie,
    length_of,
    limits_text,
    make_shape,
    read_each,
    warn_of_rows,
)
from experiments.common.settings import Data
from rljax.data.examples import (
    Comparison,
    Example,
    Judgment,
    Steps,
    comparison,
    demonstration,
    gold,
    judgment,
    ranking,
    steps,
)
from rljax.data.files import Table, read_table
from rljax.data.formats import format_of
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import hf
from rljax.train.log import console, is_interactive, log_info, printable


class WithGold(NamedTuple):
    """A comparison with a third completion, to be imitated."""

    pair: Comparison
    gold: Example


def with_gold(row: dict, tokenizer: Tokenizer) -> WithGold:
    """A comparison and the `gold` of its row."""
    return WithGold(comparison(row, tokenizer), gold(row, tokenizer))


READERS: dict[str, Read] = {
    "prompt": data.read_prompt,
    "demonstration": demonstration,
    "comparison": lambda row, tokenizer: with_gold(row, tokenizer) if "gold" in row else comparison(row, tokenizer),
    "judgment": judgment,
    "steps": steps,
    "ranking": ranking,
}
KIND_OF_FORMAT = {  # what a row is read as, unless --kind says otherwise
    "preference": "comparison",
    "unpaired preference": "judgment",
    "stepwise supervision": "steps",
    "ranking": "ranking",
    "prompt": "prompt",
}
NO_LIMIT = 10**9  # tokens of a row where the model's context is unknown


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows to look at, and as what."""

    model: str  # directory with a tokenizer, or OWNER/NAME on the hub
    data: Data  # the rows
    kind: Literal["auto", "prompt", "demonstration", "comparison", "judgment", "steps", "ranking"] = (
        "auto"  # what a row is read as
    )
    rows: int = 10  # rows to show; all are counted
    json: bool = False  # one object a line


def main(cfg: Config) -> list[dict]:
    """Print rows; return what --json prints of those. Raises ValueError, after all rows, if some cannot be read."""
    if not cfg.data.files:
        raise ValueError("which rows? legal: --data.files FILE.jsonl, and more of them")
    model = hub.find_model(cfg.model)
    tokenizer = load_tokenizer(model)
    context = (
        hf.read_config(model, reward_model=True).max_positions if (Path(model) / "config.json").is_file() else NO_LIMIT
    )
    max_tokens = cfg.data.max_tokens or context
    limits = (cfg.data.max_prompt_tokens or max_tokens, max_tokens)
    records = []
    first_error = ""
    counts: Counter = Counter()
    reasons: Counter = Counter()  # of rows that cannot be read
    lengths = []
    for path in cfg.data.files:
        table = read_table(data.split_weight(path)[0])
        found = list(read(table, cfg, tokenizer))
        if not cfg.json:
            warn_of_rows(table, [one for one in found if isinstance(one, Found)], tokenizer)
        for one in found:
            record = as_record(one, cfg.data.overlong, limits)
            counts[record["status"]] += 1
            lengths.append(record.pop("length", 0))
            is_told = False
            if record["status"] == "cannot be read":
                first_error = first_error or f"{record['place']}: {record['why']}"
                is_told = record["why"] in reasons and not cfg.json
                reasons[record["why"]] += 1
            if len(records) < cfg.rows and not is_told:
                records.append(record)
                show(record, tokenizer, cfg.json)
    if not cfg.json:
        for why, count in reasons.items():
            if count > 1:
                log_info(f"the same for {count - 1} more rows: {why}")
        became = ", ".join(f"{count} {status}" for status, count in counts.items())
        allowed = f", {limits_text(*limits)} allowed" if max_tokens < NO_LIMIT else ""
        log_info(f"{sum(counts.values())} rows: {became}; at most {max(lengths)} tokens{allowed}")
    if counts["cannot be read"]:
        unread = counts["cannot be read"]
        raise ValueError(f"{unread} of {sum(counts.values())} rows cannot be read; the first: {first_error}")
    return records


def read(table: Table, cfg: Config, tokenizer: Tokenizer) -> Iterator[Found | Unread]:
    """Each row as scripts read it; its item is (format, what was read)."""

    def read_as_its_format(row: dict, tokenizer: Tokenizer) -> tuple[str, Any]:
        name = format_of(row)
        kind = KIND_OF_FORMAT.get(name, "demonstration") if cfg.kind == "auto" else cfg.kind
        return name, READERS[kind](row, tokenizer)

    shape = make_shape(cfg.data.template, cfg.data.completion, cfg.data)
    return read_each(table, shape, read_as_its_format, tokenizer)


def as_record(found: Found | Unread, overlong: str, limits: tuple[int, int]) -> dict:
    """What --json prints of a row: its place, its format, what became of it, and its texts as ids and masks."""
    if isinstance(found, Unread):
        return {"place": found.place, "status": "cannot be read", "why": found.why}
    name, item = found.item
    record = {"place": found.place, "format": name, "status": "kept", "length": length_of(item)}
    if is_overlong(item, *limits):
        why = f"{length_of(item)} tokens; at most {limits_text(*limits)}"
        shorter = None if overlong == "error" else CUTS[overlong](item, *limits)
        record |= {"status": "dropped" if shorter is None else overlong, "why": why}
        item = item if shorter is None else shorter
    if record["status"] != "dropped" and is_tie(item):
        record |= {"status": "left out", "why": "its completions are equal"}
    return record | texts_of(item)


def texts_of(item: Any) -> dict:
    """The texts of what was read from a row, as ids and masks, with what else it holds."""
    if isinstance(item, Comparison):
        return {"chosen": as_ids(item.chosen), "rejected": as_ids(item.rejected), "margin": item.margin}
    if isinstance(item, WithGold):
        return texts_of(item.pair) | {"gold": as_ids(item.gold)}
    if isinstance(item, list):
        return {"completions": [as_ids(example) for example in item]}
    if isinstance(item, Judgment):
        return as_ids(item.example) | {"label": item.desirable}
    if isinstance(item, Steps):
        before = [0] * len(item.example.prompt)
        pairs = zip(item.step_ends, item.labels, strict=True)
        labels = [label if ends and not math.isnan(label) else None for ends, label in pairs]
        return as_ids(item.example) | {"step_ends": [*before, *map(int, item.step_ends)], "labels": [*before, *labels]}
    return as_ids(item)


def as_ids(example: Example) -> dict:
    """The ids of a text, and 1 where one is learned."""
    return {
        "ids": [*example.prompt, *example.completion],
        "mask": [0] * len(example.prompt) + [int(learned) for learned in example.mask],
        "prompt_tokens": len(example.prompt),
        "completion_tokens": len(example.completion),
    }


def show(record: dict, tokenizer: Tokenizer, as_json: bool) -> None:
    """Print a row."""
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    why = f": {record['why']}" if "why" in record else ""
    log_info(f"{record['place']} ({record.get('format', 'no format')}, {record['status']}{why})", "bold")
    for name, text in named_texts(record):
        rest = {key: record[key] for key in ("margin", "label") if record.get(key) is not None}
        notes = "".join(f", {key} {value}" for key, value in rest.items())
        log_info(f"{name} {text['prompt_tokens']} prompt + {text['completion_tokens']} tokens{notes}".strip(), "dim")
        if is_interactive():
            console.print(colored(text, tokenizer), soft_wrap=True)
        else:
            log_info(f"text: {in_brackets(text, tokenizer)}")
            log_info(f"ids: {' '.join(map(str, text['ids']))}")
            log_info(f"mask: {' '.join(map(str, text['mask']))}")


def named_texts(record: dict) -> Iterator[tuple[str, dict]]:
    """The texts of a row, each with its name where there are several."""
    if "ids" in record:
        yield "", record
    for name in ("chosen", "rejected", "gold"):
        if name in record:
            yield name, record[name]
    for place, text in enumerate(record.get("completions", ()), 1):
        yield f"place {place}", text


def in_brackets(text: dict, tokenizer: Tokenizer) -> str:
    """A text in one line, what is learned in brackets."""
    pieces = tokenizer.token_bytes()
    shown = ""
    for learned, run in itertools.groupby(zip(text["ids"], text["mask"], strict=True), key=lambda pair: pair[1]):
        encoded = b"".join(pieces[token] or tokenizer.decode_all([token]).encode() for token, _ in run)
        part = printable(encoded.decode("utf-8", "replace")).replace("\n", "\N{RETURN SYMBOL}")
        shown += f"[{part}]" if learned else part
    return shown


def colored(text: dict, tokenizer: Tokenizer) -> Text:
    """The tokens of a text, every second one on a shade; what is learned in green, ends of steps underlined."""
    shown = Text()
    pieces = tokenizer.token_bytes()
    ends = text.get("step_ends", [0] * len(text["ids"]))
    for i, (token, learned, is_end) in enumerate(zip(text["ids"], text["mask"], ends, strict=True)):
        style = ("green" if learned else "dim") + (" on grey15" if i % 2 else "") + (" underline" if is_end else "")
        piece = printable(pieces[token].decode("utf-8", "replace") or tokenizer.decode_all([token]))
        shown.append(piece.replace("\n", "\N{RETURN SYMBOL}\n"), style)
    return shown


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
