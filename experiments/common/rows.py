"""Rows of a file as token ids: texts by templates and as chats, what is too long, and where an error stands."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments.common.settings import Rows
from rljax.data.chat import ignores_tools
from rljax.data.examples import Example, Steps, prompt_of
from rljax.data.files import Table
from rljax.data.formats import TEXTS, is_conversation, messages_of
from rljax.data.prompts import from_template
from rljax.data.tokenizer import Tokenizer
from rljax.train.log import log_info

T = TypeVar("T")
Read = Callable[[dict, Tokenizer], Any]  # row -> an Example, or a tuple or list that holds some

# LaTeX's commands that begin with n: within them "\\n" is no new line.
COMMANDS = """
    nabla natural ncong ne nearrow neg negmedspace negthickspace negthinspace neq nequiv newcommand newcounter
    newenvironment newif newlength newline newpage newtheorem nexists ngeq ngeqq ngeqslant ngtr ngtrsim ni nicefrac
    nleftarrow nLeftarrow nleftrightarrow nLeftrightarrow nleq nleqq nleqslant nless nlesssim nmid nobreak
    nobreakspace nocite node noindent nolimits nolinebreak nonumber nopagebreak norm normalfont normalsize not notag
    notin notni nparallel nprec npreceq nrightarrow nRightarrow nshortmid nshortparallel nsim nsimeq nsubset
    nsubseteq nsubseteqq nsucc nsucceq nsupset nsupseteq nsupseteqq ntriangleleft ntrianglelefteq ntriangleright
    ntrianglerighteq nu null num numberwithin nvdash nvDash nVdash nVDash nwarrow
"""
ESCAPED = re.compile(rf"\\n(?:(?P<rest>{'|'.join(name[1:] for name in COMMANDS.split())})(?![A-Za-z]))?")


def unescape(text: str) -> str:
    """A text of the command line, in which \\n is a new line, but not within a command of LaTeX such as \\neq.

    One line says which were left as they are.
    """
    kept = {match[0] for match in ESCAPED.finditer(text) if match["rest"]}
    if kept:
        log_info(
            f"{', '.join(sorted(kept))} in {text!r} is left as it is, as LaTeX's; where \\n is to be a new line, write "
            "a new line itself, or of a template @FILE, the file that holds it"
        )
    return ESCAPED.sub(lambda match: match[0] if match["rest"] else "\n", text)


def read_template(text: str) -> Callable[[dict], str]:
    """The template of a setting: its text, or with @ before it the file that holds it, taken as it is."""
    if not text.startswith("@"):
        return from_template(unescape(text))
    file = Path(text[1:])
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} of a template")
    return from_template(file.read_text(encoding="utf-8").removesuffix("\n"))


def make_shape(template: str, completion: str, settings: Rows) -> Callable[[dict], dict]:
    """row -> the row with the columns that its format wants: texts from templates, and conversations from texts."""
    templates = {"prompt": template, "completion": completion}
    written = {name: read_template(text) for name, text in templates.items() if text not in ("", f"{{{name}}}")}

    def shape(row: dict) -> dict:
        row = row | {name: text(row) for name, text in written.items()}
        if settings.chat:
            row = row | _as_conversations(row)
        return row | _with_system(row, settings.system) if settings.system else row

    return shape


def text_of_prompt(row: dict) -> str:
    """The text of a prompt to be shown; of a conversation the last message that is answered."""
    prompt = prompt_of(row)
    return prompt if isinstance(prompt, str) else messages_of({"prompt": prompt}, "prompt")[-1]["content"]


def _as_conversations(row: dict) -> dict:
    """The texts of a row as messages: the prompt a user's, the rest the assistant's."""
    if "text" in row and "prompt" not in row:
        raise ValueError("column 'text' has no user's message to make a conversation of; legal with chat: a prompt")
    roles = {
        "prompt": "user",
        "completion": "assistant",
        "chosen": "assistant",
        "rejected": "assistant",
        "gold": "assistant",
    }
    made: dict = {
        name: [{"role": role, "content": row[name]}] for name, role in roles.items() if isinstance(row.get(name), str)
    }
    texts = row.get("completions")
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        messages = [{"role": "assistant", "content": text} for text in texts]
        made["completions"] = messages if "labels" in row else [[message] for message in messages]
    return made


def _with_system(row: dict, system: str) -> dict:
    """The conversations that begin the row, with a system message before them unless they have one."""
    first = [name for name in ("prompt", "messages") if name in row] or ["chosen", "rejected"]
    for name in first:
        if name in row and not is_conversation(row[name]):
            raise ValueError(
                f"a system message, but column {name!r} is no conversation; legal: with chat, or without it"
            )
    message = {"role": "system", "content": system}
    return {name: [message, *row[name]] for name in first if name in row and row[name][0].get("role") != "system"}


class Found(NamedTuple):
    """What was read from a row."""

    item: Any  # what `read` returned
    row: dict  # as the file has it
    place: str  # FILE, line 7
    key: tuple  # of its prompt: rows of equal keys are on one side of a split
    key_is_common: bool = False  # the key is what two texts both begin with: the prompt, or more of both answers


def read_rows(table: Table, shape: Callable[[dict], dict], read: Read, tokenizer: Tokenizer) -> list[Found]:
    """read(row) of every row of a file. Raises ValueError, with file and line, for what cannot be read."""
    found = []
    for one in read_each(table, shape, read, tokenizer):
        if isinstance(one, Unread):
            raise ValueError(f"{one.place}: {one.why}")
        found.append(one)
    warn_of_rows(table, found, tokenizer)
    return found


class Unread(NamedTuple):
    """A row that cannot be read."""

    why: str
    place: str  # FILE, line 7


def read_each(
    table: Table, shape: Callable[[dict], dict], read: Read, tokenizer: Tokenizer
) -> Iterator[Found | Unread]:
    """read(row) of each row of a file, or why it cannot be read."""
    kind = None
    for i, row in enumerate(table.rows):
        try:
            shaped = shape(row)
            kind = _same_kind(kind, shaped, table)
            item = read(shaped, tokenizer)
        except ValueError as error:
            yield Unread(str(error), table.place(i))
            continue
        yield Found(item, row, table.place(i), *_key(shaped, item, tokenizer))


def warn_of_rows(table: Table, found: Sequence[Found], tokenizer: Tokenizer) -> None:
    """One line where the chat template ignores tools, and one where texts begin with BOS, which is added once more."""
    warn_of_ignored_tools(table, tokenizer)
    added = tokenizer.encode("")[:1]
    firsts = [next(examples_in(one.item)) for one in found] if added else []
    count = sum([*first.prompt[:2], *first.completion[:2]][:2] == 2 * added for first in firsts)
    if count:
        log_info(
            f"warning: {count} of {len(table.rows)} rows begin with {tokenizer.decode_all(added)!r} twice: the text "
            "holds it, and the tokenizer adds it; legal: texts without it",
            "yellow",
        )


def warn_of_ignored_tools(table: Table, tokenizer: Tokenizer) -> None:
    """One line where rows have tools, and the chat template does not write them."""
    count = sum(bool(row.get("tools")) for row in table.rows)
    if count and tokenizer.chat is not None and ignores_tools(tokenizer.chat):
        log_info(
            f"warning: {count} of {len(table.rows)} rows have tools, and the chat template of {tokenizer.chat.name} "
            "ignores them: the model does not see them",
            "yellow",
        )


def _same_kind(kind: bool | None, row: dict, table: Table) -> bool | None:
    """Whether the row's texts are conversations, as those of the rows before."""
    mine = any(is_conversation(row[name]) for name in TEXTS if name in row)
    if kind not in (None, mine):
        kinds = ("a conversation", "plain text") if mine else ("plain text", "a conversation")
        raise ValueError(f"{kinds[0]}, but {table.place(0)} is {kinds[1]}; legal: one of both in a file")
    return mine


def _key(row: dict, item: Any, tokenizer: Tokenizer) -> tuple[tuple, bool]:
    """The key of the row's prompt, and whether it is what two texts both begin with."""
    first = next(examples_in(item))
    whole = (*first.prompt, *first.completion)
    if not {"prompt", "messages", "completion"} & set(row):
        if isinstance(row.get("chosen"), str):
            has_prompt = len(first.prompt) > len(tokenizer.encode(""))
            return (tuple(first.prompt), True) if has_prompt else (whole, False)
        if "text" in row:
            return whole, False
    return tuple(first.prompt), False


def split_keys(found: Sequence[Found]) -> list[tuple]:
    """A key for each row: rows of equal keys are on one side of a split.

    Of pairs without a prompt, keys of which one is the beginning of another are one: "Q: best? A:" is the prompt of a
    pair whose answers begin alike, too.
    """
    shortest: dict[tuple, tuple] = {}
    root: tuple = ()
    for key in sorted({one.key for one in found if one.key_is_common}):  # a beginning stands right before what follows
        root = root if root and key[: len(root)] == root else key
        shortest[key] = root
    return [shortest[one.key] if one.key_is_common else one.key for one in found]


def is_tie(item: Any) -> bool:
    """Whether the completions that are compared are equal: nothing is learned from them."""
    first, *others = examples_in(item)
    return bool(others) and all(other[:2] == first[:2] for other in others)


def examples_in(item: Any) -> Iterator[Example]:
    """The examples of what was read from a row."""
    if isinstance(item, Example):
        yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from examples_in(part)


# ----------------------------------------------------------------------------------------------------------- over-long


def is_overlong(item: Any, max_prompt_tokens: int, max_tokens: int) -> bool:
    """Whether the item has a longer prompt, or prompt and completion are longer."""
    return any(
        len(example.prompt) > max_prompt_tokens or len(example.prompt) + len(example.completion) > max_tokens
        for example in examples_in(item)
    )


def cut_left(item: T, max_prompt_tokens: int, max_tokens: int) -> T | None:
    """Without the beginning of its prompt, the same of each completion's; None where a completion leaves no prompt."""
    longest = max(len(example.completion) for example in examples_in(item))
    room = min(max_prompt_tokens, max_tokens - longest)
    return None if room < 1 else _map_examples(item, lambda example: example._replace(prompt=example.prompt[-room:]))


def cut_right(item: T, max_prompt_tokens: int, max_tokens: int) -> T | None:
    """Without what is too long at the end of prompt and completions; None where nothing is left to learn from one."""

    def cut(example: Example) -> Example:
        prompt = example.prompt[:max_prompt_tokens]
        room = max_tokens - len(prompt)
        return example._replace(prompt=prompt, completion=example.completion[:room], mask=example.mask[:room])

    shorter = _map_examples(item, cut)
    pairs = zip(examples_in(item), examples_in(shorter), strict=True)
    return None if any(any(old.mask) and not any(new.mask) for old, new in pairs) else shorter


def _map_examples(item: Any, change: Callable[[Example], Example]) -> Any:
    """The item with its examples changed."""
    if isinstance(item, Example):
        return change(item)
    if isinstance(item, Steps):
        example = change(item.example)
        length = len(example.completion)
        return Steps(example, item.step_ends[:length], item.labels[:length])
    if isinstance(item, list):
        return [_map_examples(part, change) for part in item]
    if isinstance(item, tuple):
        parts = [_map_examples(part, change) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


CUTS = {"drop": lambda item, *_: None, "cut_left": cut_left, "cut_right": cut_right}


def shorten(
    found: Sequence[Found], overlong: str, max_prompt_tokens: int, max_tokens: int, what: str = "rows"
) -> tuple[list[Found], int, int]:
    """The rows that fit, those that can be cut among them, and how many were dropped and cut.

    Raises ValueError for a row that does not fit where `overlong` is "error", and where none is left.
    """
    kept = []
    cut = 0
    for one in found:
        if not is_overlong(one.item, max_prompt_tokens, max_tokens):
            kept.append(one)
            continue
        if overlong == "error":
            raise ValueError(
                f"{one.place}: {length_of(one.item)} tokens; at most {limits_text(max_prompt_tokens, max_tokens)}"
            )
        shorter = CUTS[overlong](one.item, max_prompt_tokens, max_tokens)
        if shorter is not None:
            kept.append(one._replace(item=shorter))
            cut += 1
    if not kept:
        shortest = min(length_of(one.item) for one in found)
        limits = limits_text(max_prompt_tokens, max_tokens)
        raise ValueError(f"every {what.removesuffix('s')} is longer than {limits}; the shortest has {shortest}")
    return kept, len(found) - len(kept), cut


def length_of(item: Any) -> int:
    """Tokens of the longest text of what was read from a row."""
    return max(len(example.prompt) + len(example.completion) for example in examples_in(item))


def limits_text(max_prompt_tokens: int, max_tokens: int) -> str:
    """The limits in words."""
    if max_prompt_tokens >= max_tokens:
        return f"{max_tokens} tokens"
    return f"{max_tokens} tokens, {max_prompt_tokens} of them the prompt"
