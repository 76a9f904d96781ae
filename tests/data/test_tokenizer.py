"""Text to ids and back."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from rljax.data.chat import encode_prompt
from rljax.data.token_bytes import read_token_bytes
from rljax.data.tokenizer import character_tokenizer, load_tokenizer, save_characters

ALPHABET = "0123456789+="
CHARACTERS = character_tokenizer(ALPHABET)


@given(st.text(ALPHABET))
def test_characters_come_back(text):
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert set(ids) <= set(range(1, CHARACTERS.size))
    assert CHARACTERS.decode(ids) == text


def test_the_end_is_no_character():
    assert CHARACTERS.stop == (0,)
    assert CHARACTERS.size == 13
    assert CHARACTERS.decode([*CHARACTERS.encode("1+2"), 0]) == "1+2"
    assert CHARACTERS.decode([99, 1]) == "0"


def test_characters_outside_the_alphabet():
    with pytest.raises(ValueError, match=r"characters \[' ', '\*'\] are not in the alphabet '0123456789\+='"):
        CHARACTERS.encode("1 * 2*")


# ---------------------------------------------------------------------------------------------------- bytes of tokens


def assert_pieces_make_the_text(tokenizer, ids, strips: bool = False):
    """Joined, they are what the tokenizer decodes; some strip a space from the beginning."""
    pieces = tokenizer.token_bytes()
    text = b"".join(pieces[i] for i in ids).decode("utf-8", "replace")
    assert tokenizer.decode(ids) == (text.removeprefix(" ") if strips else text)


@given(st.lists(st.integers(0, CHARACTERS.size - 1)))
def test_pieces_of_characters(ids):
    assert len(CHARACTERS.token_bytes()) == CHARACTERS.size
    assert_pieces_make_the_text(CHARACTERS, ids)


def test_pieces_of_characters_as_transformers_reads_them(tmp_path):
    save_characters("ab €", tmp_path)
    assert load_tokenizer(tmp_path).token_bytes() == character_tokenizer("ab €").token_bytes()


TEXTS = ["Once upon a time: é, 日本語 and 🙂!\n\n\tx", "a  b", "the end."]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A byte-level BPE in the manner of GPT-2 and Qwen, with added tokens that are special, and that are not."""
    made = Inner(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    made.add_tokens(["<tool call>", "Ġé"])  # the first has a character that the alphabet lacks
    directory = tmp_path_factory.mktemp("bytewise")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(directory)
    return load_tokenizer(directory)


def test_special_tokens_without_a_row_in_the_embedding(tmp_path):
    """Gemma 3's text models: <image_soft_token> is 262144, of an embedding with as many rows. No text needs it."""
    made = Inner(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<image>": 3}, unk_token="b"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<end>", "<image>")])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 3)
    assert (tokenizer.encode("ab"), tokenizer.size, tokenizer.token_bytes()) == ([1, 2], 3, [b"", b"a", b"b"])
    for encode in (tokenizer.encode, tokenizer.encode_more):
        with pytest.raises(
            ValueError, match="a text has '<image>', id 3, beyond the model's ids; legal: texts without"
        ):
            encode("a<image>")
    assert load_tokenizer(tmp_path, 4).encode("a<image>") == [1, 3]
    with pytest.raises(ValueError, match=r"the tokenizer has 4 ids, the model 2; legal: .* unlike 'b', 2"):
        load_tokenizer(tmp_path, 2)


def test_pieces_of_bytes(bytewise):
    pieces = bytewise.token_bytes()
    assert len(pieces) == bytewise.size > 256 + 20
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    assert [pieces[bytewise.size - k] for k in (3, 2, 1)] == [b"", b"<tool call>", b" \xe9"]
    for text in TEXTS:
        assert b"".join(pieces[i] for i in bytewise.encode(text)) == text.encode()
    for ids in np.random.default_rng(0).integers(0, bytewise.size, (200, 12)):
        assert_pieces_make_the_text(bytewise, ids)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "without a decoder puts spaces between"),
        (decoders.WordPiece(), "WordPiece decoder cannot be read; legal: ByteLevel, Metaspace, or a Sequence of"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip decoder cannot be read"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]), r"changes the joined text \(Replace\)"),
    ],
)
def test_pieces_that_cannot_be_read(decoder, message, tmp_path):
    made = Inner(models.WordLevel({"<end>": 0, "a": 1}))
    if decoder is not None:
        made.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path).token_bytes()


def test_pieces_with_a_mark_for_spaces(tmp_path):
    made = Inner(models.WordLevel({"<end>": 0, "▁a": 1, "b▁": 2}))
    made.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_bytes() == [b"", b" a", b"b "]
    assert_pieces_make_the_text(tokenizer, [1, 2, 1, 0, 2], strips=True)


# -------------------------------------------------------------------------------------------------------------- chat


def test_a_byte_is_no_text_for_the_steps_after_it():
    made = Inner(models.BPE({"<0x41>": 0, "▁b": 1}, []))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse()])
    assert read_token_bytes(made, 2) == [b"A", b" b"]


def test_chat(tmp_path):
    save_characters("abU:> ", tmp_path)
    assert load_tokenizer(tmp_path).chat is None
    template = "{% for m in messages %}{{ m.role[0] | upper }}: {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}> {% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    assert encode_prompt(tokenizer.chat, [{"role": "user", "content": "ab"}]) == tokenizer.encode("U: ab> ")


# ------------------------------------------------------------------------------------------------------- stories260k


@pytest.fixture(scope="module")
def directory(shared):
    return shared / "models" / "stories260k"


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a girl.", 'She said: "42 cats?"\nNo.', "  two spaces", "é ✓"]
)
def test_stories260k_round_trip(directory, text):
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text)
    assert ids[0] == 1  # its beginning of a text
    assert max(ids) < tokenizer.size == 512
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, *tokenizer.stop]) == text
    assert tokenizer.stop == (2,)


def test_stories260k_pieces(directory):
    tokenizer = load_tokenizer(directory)
    pieces = tokenizer.token_bytes()
    assert pieces[:3] == [b"", b"", b""]
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    plain = [i for i, piece in enumerate(pieces) if piece.isascii()]  # of bytes that are no text, it makes a � each
    for ids in np.random.default_rng(0).choice(plain, (200, 12)):
        assert_pieces_make_the_text(tokenizer, ids, strips=True)
    for text in TEXTS:
        assert b"".join(pieces[i] for i in tokenizer.encode(text)) == b" " + text.encode()


def test_stop_ids_are_gathered_from_every_file(directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert load_tokenizer(tmp_path).stop == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop == (2, 5, 7, 9)
    assert tokenizer.pad in range(tokenizer.size)


def test_no_tokenizer(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path / "absent")):
        load_tokenizer(tmp_path / "absent")
