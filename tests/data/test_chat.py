"""Conversations as token ids and masks, against what TRL 1.16 trains on under five chat templates."""

import json

import pytest

from rljax.data.examples import demonstration, prompt_ids
from rljax.data.tokenizer import load_tokenizer

TEMPLATES = ("gemma", "llama3", "phi3", "qwen2_5", "qwen3")


CASES = ("one_turn", "system", "two_turns", "unicode", "white_space", "empty_assistant", "looks_like_a_header", "think")


def spans(mask):
    """The runs of True, as (start, end)."""
    padded = [False, *map(bool, mask), False]
    edges = [i for i in range(len(padded) - 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_and_masks_that_trl_trains_on(name, case, shared):
    """Equal, but for what the sampler never draws: the mask then begins where the generation prompt ends, and ends with
    the token that stops the sampler.
    """
    recording = json.loads((shared / "chat" / name / "cases.json").read_text())[case]
    tokenizer = load_tokenizer(shared / "chat" / name)
    row = {"messages": recording["conversation"]}
    if "refused" in recording:
        with pytest.raises(ValueError, match="the chat template of .*fails on messages of .*: " + recording["refused"]):
            demonstration(row, tokenizer)
        return
    example = demonstration(row, tokenizer)
    ids = [*example.prompt, *example.completion]
    assert ids == recording["ids"]
    ours = spans([False] * len(example.prompt) + example.mask)
    theirs = spans(recording["assistant_mask"])
    header = len(tokenizer.encode_more("\n")) if name == "qwen2_5" else 0  # TRL trains on the header's end
    for (start, end), (their_start, their_end) in zip(ours, theirs, strict=True):
        assert start == their_start + header
        stops = [i for i in range(start, their_end) if ids[i] in tokenizer.stop]
        assert end == (stops[0] + 1 if stops else their_end)
        assert tokenizer.encode_more("\n") * (their_end - end) == ids[end:their_end]
    if (name, case) != ("qwen3", "two_turns"):  # whose prompts leave out earlier thoughts
        assert ids[: ours[-1][0]] == prompt_ids(row, tokenizer)
