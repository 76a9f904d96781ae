"""Text <-> token ids: characters for models trained from scratch, a Hugging Face tokenizer for all others."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rljax.data.token_bytes import read_token_bytes


class Tokenizer(NamedTuple):
    """The functions of a tokenizer that rljax uses, and its special ids."""

    encode: Callable[[str], list[int]]  # a prompt, with the special tokens that begin a text
    encode_more: Callable[[str], list[int]]  # what follows a prompt: no special tokens are added
    decode: Callable[[Sequence[int]], str]  # special tokens are left out
    stop: tuple[int, ...]  # ids that end a completion
    eos: int | None  # ends a completion that is learned from
    pad: int  # any id: padding is told by masks, never by ids
    size: int
    token_bytes: Callable[[], list[bytes]]  # the bytes of each token inside a text; empty for special ones
    chat: Callable[[str], list[int]] | None = None  # a user's message in the chat template; None: there is none


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
        characters.encode,
        characters.decode,
        stop=(0,),
        eos=0,
        pad=0,
        size=size,
        token_bytes=characters.token_bytes,
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


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory; its EOS ids from generation_config.json or config.json too."""
    from transformers import AutoTokenizer  # a second of import: only where it is needed

    directory = Path(directory)
    inner = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    stop = tuple(sorted(_eos_ids(directory) | {inner.eos_token_id} - {None}))

    def encode(text: str) -> list[int]:
        return inner(text)["input_ids"]

    def encode_more(text: str) -> list[int]:
        return inner(text, add_special_tokens=False)["input_ids"]

    def decode(ids: Sequence[int]) -> str:
        return inner.decode(list(ids), skip_special_tokens=True)

    def token_bytes() -> list[bytes]:
        if not hasattr(inner, "backend_tokenizer"):
            raise ValueError(
                f"{directory}: the tokens of a {type(inner).__name__} cannot be read; legal: tokenizer.json"
            )
        return read_token_bytes(inner.backend_tokenizer, len(inner))

    def chat(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return inner.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    return Tokenizer(
        encode,
        encode_more,
        decode,
        stop,
        eos=inner.eos_token_id,
        pad=stop[0] if stop else 0,
        size=len(inner),
        token_bytes=token_bytes,
        chat=chat if inner.chat_template else None,
    )


def _eos_ids(directory: Path) -> set[int]:
    """The EOS ids of generation_config.json and config.json."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        value = json.loads(file.read_text()).get("eos_token_id")
        if isinstance(value, list):
            ids |= set(value)
        elif value is not None:
            ids.add(value)
    return ids
