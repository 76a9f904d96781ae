"""Text to ids and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljax.data.tokenizer import character_tokenizer, load_tokenizer

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
