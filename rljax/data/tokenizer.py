"""Text <-> token ids: characters for what is trained from scratch, a Hugging Face tokenizer for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rljax.data.token_bytes import pieces_of


class Tokenizer(NamedTuple):
    encode: Any  # str -> list[int]: a prompt, with the special tokens that begin a text
    decode: Any  # list[int] -> str: special tokens left out
    stop: tuple[int, ...]  # ids that end an answer
    pad: int  # any id: padding is told by masks, never by ids
    size: int
    pieces: Any  # () -> list[bytes]: what each token stands for inside a text; special ones for nothing
    chat: Any = None  # str -> list[int]: what a user says, in the chat template; None: there is none


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

    def pieces(self) -> list[bytes]:
        return [b"", *(c.encode() for c in self.alphabet)]


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token a character; id 0 ends an answer."""
    characters = _Characters(alphabet)
    size = len(alphabet) + 1
    return Tokenizer(characters.encode, characters.decode, stop=(0,), pad=0, size=size, pieces=characters.pieces)


def save_characters(alphabet: str, directory: str | Path) -> None:
    """The character tokenizer as files that transformers reads."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Inner(models.WordLevel({"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(directory)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory; its EOS ids from generation_config.json or config.json too."""
    import json

    from transformers import AutoTokenizer  # a second of import: only where it is needed

    directory = Path(directory)
    inner = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    ends = {inner.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        if (directory / file).is_file():
            value = json.loads((directory / file).read_text()).get("eos_token_id")
            ends |= set(value) if isinstance(value, list) else {value}
    stop = tuple(sorted(ends - {None}))

    def encode(text: str) -> list[int]:
        return inner(text)["input_ids"]

    def decode(ids: Sequence[int]) -> str:
        return inner.decode(list(ids), skip_special_tokens=True)

    def pieces() -> list[bytes]:
        if not hasattr(inner, "backend_tokenizer"):
            raise ValueError(
                f"{directory}: the pieces of a {type(inner).__name__} cannot be read; legal: tokenizer.json"
            )
        return pieces_of(inner.backend_tokenizer, len(inner))

    def chat(text: str) -> list[int]:
        said = [{"role": "user", "content": text}]
        return inner.apply_chat_template(said, add_generation_prompt=True, return_dict=False)

    return Tokenizer(
        encode,
        decode,
        stop,
        pad=stop[0] if stop else 0,
        size=len(inner),
        pieces=pieces,
        chat=chat if inner.chat_template else None,
    )
