"""Text <-> token ids: characters for models trained from scratch, a Hugging Face tokenizer for all others."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rljax.data.chat import Chat
from rljax.data.chat_template import read_chat
from rljax.data.token_bytes import read_token_bytes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
BRACKETS = re.compile(r"<.+>|\[.+\]")
TEXT_MARKS = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
)


class Tokenizer(NamedTuple):
    """The functions of a tokenizer that rljax uses, and its special ids."""

    encode: Callable[[str], list[int]]  # a prompt, with the special tokens that begin a text
    decode: Callable[[Sequence[int]], str]  # special tokens are left out
    decode_all: Callable[[Sequence[int]], str]  # special tokens included
    stop: tuple[int, ...]  # ids that end a completion
    pad: int  # any id: padding is told by masks, never by ids
    size: int
    token_bytes: Callable[[], list[bytes]]  # the bytes of each token inside a text; empty for special ones
    encode_more: Callable[[str], list[int]]  # a text without special tokens around it
    eos: int | None  # the id that ends a completion that is given as text
    vocabulary: Callable[[], dict[str, int]]  # token -> id
    chat: Chat | None = None  # None: the model has no chat template
    special_tokens: tuple[str, ...] = ()  # texts that speak to the model as its chat template does: see `_read_markers`


@dataclass(frozen=True)
class _Characters:
    alphabet: str

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self.alphabet))
        if unknown:
            raise ValueError(f"characters {unknown} are not in the alphabet {self.alphabet!r}")
        return [self.alphabet.index(c) + 1 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i - 1] for i in ids if 0 < i <= len(self.alphabet))

    def token_bytes(self) -> list[bytes]:
        return [b"", *(c.encode() for c in self.alphabet)]


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token a character; id 0 ends a completion."""
    characters = _Characters(alphabet)
    size = len(alphabet) + 1
    return Tokenizer(
        characters.encode,
        characters.decode,
        characters.decode,
        stop=(0,),
        pad=0,
        size=size,
        token_bytes=characters.token_bytes,
        encode_more=characters.encode,
        eos=0,
        vocabulary=lambda: {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)},
    )


def save_characters(alphabet: str, directory: str | Path) -> None:
    """Write the character tokenizer as files that transformers reads. It is not imported: that takes a second."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    inner = HFTokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["<end>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def load_tokenizer(directory: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    A completion ends at the EOS ids of tokenizer, generation_config.json and config.json, and at the token with which
    the chat template ends a turn.

    Args:
      vocab_size: ids of the model; None: those of the tokenizer. Special tokens beyond them, as the <image_soft_token>
      of Gemma 3's text models, are no part of it: where a text holds one, encoding raises ValueError.
    Raises ValueError or FileNotFoundError, naming the file, where there is none or where it cannot be read; ValueError
    where other tokens, or those that end a completion, are beyond the model's ids.
    """
    directory = Path(directory)
    inner = _read_inner(directory)
    eos = inner.eos_token_id
    ends = _eos_ids(directory) | {eos} - {None}
    beyond = {} if vocab_size is None else _special_beyond(inner, directory, vocab_size, ends)

    def encode(text: str) -> list[int]:
        return _without(beyond, inner(text)["input_ids"])

    def encode_more(text: str) -> list[int]:
        return _without(beyond, inner(text, add_special_tokens=False)["input_ids"])

    def decode(ids: Sequence[int]) -> str:
        return inner.decode(list(ids), skip_special_tokens=True)

    def decode_all(ids: Sequence[int]) -> str:
        return inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes() -> list[bytes]:
        if not hasattr(inner, "backend_tokenizer"):
            raise ValueError(
                f"{directory}: the tokens of a {type(inner).__name__} cannot be read; legal: tokenizer.json"
            )
        return read_token_bytes(inner.backend_tokenizer, size)

    chat = read_chat(inner, str(directory), encode_more, ends)
    if chat is not None:
        ends |= {chat.end_of_turn} - {None}
    stop = tuple(sorted(ends))
    size = len(inner) if vocab_size is None else min(len(inner), vocab_size)
    return Tokenizer(
        encode,
        decode,
        decode_all,
        stop,
        pad=stop[0] if stop else 0,
        size=size,
        token_bytes=token_bytes,
        encode_more=encode_more,
        eos=stop[0] if eos is None and stop else eos,
        vocabulary=inner.get_vocab,
        chat=chat,
        special_tokens=_read_markers(inner),
    )


def _read_inner(directory: Path):
    """transformers' tokenizer."""
    _check_tokenizer_files(directory)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice to install torch, which is not needed
    from transformers import AutoTokenizer  # a second of import: only where it is needed

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{directory}: the tokenizer cannot be read: {_first_line(error)}") from None


def _special_beyond(inner, directory: Path, vocab_size: int, ends: set[int]) -> dict[int, str]:
    """id -> token of what has no row in the model's embedding. Raises ValueError unless all are special tokens.

    An embedding's lookup would take the last row for them, without an error.
    """
    added = inner.added_tokens_decoder
    if max([len(inner) - 1, *added]) < vocab_size:
        return {}
    beyond = {number: token for token, number in inner.get_vocab().items() if number >= vocab_size}
    wrong = [number for number in sorted(beyond) if number in ends or number not in added or not added[number].special]
    if wrong:
        raise ValueError(
            f"{directory}: the tokenizer has {len(inner)} ids, the model {vocab_size}; legal: beyond them special "
            f"tokens alone that end no completion, unlike {beyond[wrong[0]]!r}, {wrong[0]}"
        )
    return beyond


def _without(beyond: dict[int, str], ids: list[int]) -> list[int]:
    """The ids. Raises ValueError where one is beyond the model's."""
    for token in beyond.keys() & ids:
        raise ValueError(f"a text has {beyond[token]!r}, id {token}, beyond the model's ids; legal: texts without it")
    return ids


def _read_markers(inner) -> tuple[str, ...]:
    """Texts by which turns, roles and calls are told: `encode` makes one id of most, wherever they stand.

    The special tokens, and of other added ones in brackets and of marks that are plain text to some tokenizers those
    that the chat template writes, as Qwen's <tool_call> and Llama-2's [INST].
    """
    template = str(inner.chat_template or "")
    added = inner.added_tokens_decoder.values()
    written = [token.content for token in added if not token.special and BRACKETS.fullmatch(token.content)]
    written += [mark for mark in TEXT_MARKS if mark not in written]
    special = [token.content for token in added if token.special]
    return (*special, *(text for text in written if text in template and text not in special))


def _check_tokenizer_files(directory: Path) -> None:
    """Refuse at once what transformers would refuse late or at length."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such model directory")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{directory} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}; copy it from the model that this one "
            "was made from"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_json(directory / name, optional=True)


def read_json(file: Path, optional: bool = False) -> dict:
    """The object in a JSON file of a model directory; {} where it is absent and `optional`.

    Raises ValueError, saying what is wrong and what to do, for a Git LFS pointer and a file that is empty or cut short.
    """
    if optional and not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file itself; get it with: git lfs pull")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        wrong = f"is not JSON ({error}): cut short?" if text.strip() else "is empty"
        raise ValueError(f"{file} {wrong}; copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; legal: an object")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _eos_ids(directory: Path) -> set[int]:
    """The EOS ids of generation_config.json and config.json."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        value = read_json(file).get("eos_token_id")
        if isinstance(value, list):
            ids |= set(value)
        elif value is not None:
            ids.add(value)
    return ids
