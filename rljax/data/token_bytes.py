"""The bytes that each token of a Hugging Face tokenizer stands for inside a text."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

LEGAL_DECODERS = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback and Fuse"
HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_token_bytes(inner: Any, size: int) -> list[bytes]:
    """The bytes of tokens 0 .. size - 1 of a `tokenizers.Tokenizer`; none for special tokens and for unknown ids.

    Concatenated they are the text that it decodes, in UTF-8, except for a space that it may strip from the beginning.
    Raises ValueError, naming the decoder, where the text is not a concatenation of the tokens' own bytes.
    """
    steps = [_decoding_step(decoder) for decoder in _token_decoders(inner.decoder)]
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}

    def bytes_of(i: int) -> bytes:
        text = inner.id_to_token(i)
        if text is None or i in special:
            return b""
        for step in steps:
            if isinstance(text, bytes):  # a byte, which no later step changes
                break
            text = step(text)
        return text if isinstance(text, bytes) else text.encode()

    return [bytes_of(i) for i in range(size)]


def _token_decoders(decoder: Any) -> Iterator[dict]:
    """The decoders of a sequence that act on single tokens: those before Fuse. After it only Strip may come."""
    if decoder is None:
        raise ValueError(f"a tokenizer without a decoder puts spaces between its tokens; legal: {LEGAL_DECODERS}")
    state = json.loads(decoder.__getstate__())
    fused = False
    for each in state["decoders"] if state["type"] == "Sequence" else [state]:
        kind = each["type"]
        if fused and kind != "Strip":
            raise ValueError(f"the tokenizer's decoder changes the joined text ({kind}); legal: {LEGAL_DECODERS}")
        if kind == "Fuse":
            fused = True
        elif not fused:
            yield each


def _decoding_step(decoder: dict) -> Callable[[str], str | bytes]:
    kind = decoder["type"]
    if kind == "ByteLevel":
        return _from_characters
    if kind == "ByteFallback":
        return _from_hexadecimal
    if kind == "Metaspace":
        return lambda text: text.replace(decoder["replacement"], " ")
    if kind == "Replace" and "String" in decoder["pattern"]:
        return lambda text: text.replace(decoder["pattern"]["String"], decoder["content"])
    raise ValueError(f"the tokens of a tokenizer with a {kind} decoder cannot be read; legal: {LEGAL_DECODERS}")


def _from_hexadecimal(text: str) -> str | bytes:
    """<0x0A> is the byte 10."""
    byte = HEX_BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the others are those from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


ALPHABET = _byte_of_character()


def _from_characters(text: str) -> bytes:
    """Added tokens may have characters outside of the alphabet: these stand for themselves."""
    try:
        return bytes(ALPHABET[c] for c in text)
    except KeyError:
        return text.encode()
