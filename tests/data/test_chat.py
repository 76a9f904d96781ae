"""Conversations as token ids and masks, against what TRL 1.16 trains on under five chat templates."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from rljax.data.chat import MARK, encode_conversation, encode_prompt, encode_reply, ignores_tools, takes_role
from rljax.data.examples import demonstration, prompt_ids
from rljax.data.tokenizer import load_tokenizer

CASES = ("one_turn", "system", "two_turns", "unicode", "white_space", "empty_assistant", "looks_like_a_header", "think")
# What TRL trains on and no sampler draws: before each turn of the assistant, after each, and after the last one.
# docs/data.md has the same table.
NOT_DRAWN = {
    "gemma": ("", "\n", "\n"),
    "llama3": ("", "", ""),
    "phi3": ("", "\n", "\n<|endoftext|>"),
    "qwen2_5": ("\n", "\n", "\n"),
    "qwen3": ("", "\n", "\n"),
}


def runs(mask):
    """The runs of True, as (start, end)."""
    padded = [False, *map(bool, mask), False]
    edges = [i for i in range(len(padded) - 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def drawn(name, mask, encode):
    """The recorded mask without what no sampler draws."""
    before, after, at_end = (len(encode(text)) for text in NOT_DRAWN[name])
    spans = runs(mask)
    kept = [False] * len(mask)
    for start, end in spans:
        last = at_end if (start, end) == spans[-1] else after
        kept[start + before : end - last] = [True] * (end - last - start - before)
    return kept


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NOT_DRAWN)
def test_the_ids_and_masks_that_trl_trains_on(name, case, shared):
    recording = json.loads((shared / "chat" / name / "cases.json").read_text())[case]
    tokenizer = load_tokenizer(shared / "chat" / name)
    row = {"messages": recording["conversation"]}
    if "refused" in recording:
        said = rf"the chat template of .*{name} refuses message 1 \(system\): {recording['refused']}"
        for read in (demonstration, prompt_ids):
            with pytest.raises(ValueError, match=said):
                read(row, tokenizer)
        return
    example = demonstration(row, tokenizer)
    assert [*example.prompt, *example.completion] == recording["ids"]
    mask = [False] * len(example.prompt) + example.mask
    assert mask == drawn(name, recording["assistant_mask"], tokenizer.encode_more)
    # The last turn begins where the generation prompt ends, as recorded, and ends with the first token that stops.
    start, end = runs(mask)[-1]
    stops = [i for i in range(start, len(mask)) if recording["ids"][i] in tokenizer.stop]
    assert end == stops[0] + 1
    if name != "qwen3" or case != "two_turns":  # a prompt of Qwen3's leaves out earlier thoughts
        prompt = tokenizer.encode_more(recording["prompt_with_generation_prompt"])
        assert prompt_ids(row, tokenizer) == prompt == recording["ids"][:start]


def test_the_page_names_each_difference():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = dict(re.findall(r"^\| (Llama 3|Gemma|Phi-3|Qwen2\.5|Qwen3) \| (.*) \|$", page, flags=re.MULTILINE))
    names = {"Llama 3": "llama3", "Gemma": "gemma", "Phi-3": "phi3", "Qwen2.5": "qwen2_5", "Qwen3": "qwen3"}
    assert {names[row] for row in rows} == set(NOT_DRAWN)
    for row, text in rows.items():
        before, after, at_end = NOT_DRAWN[names[row]]
        assert ("before each answer" in text) == bool(before)
        assert ("after each" in text) == bool(after)
        assert ("after the last" in text) == (at_end != after)


# ----------------------------------------------------------------------------------------------- templates of all kinds


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yes"}


def tokenizer_of(directory, template, merges=()):
    """Bytes as tokens, the special tokens <s>, <e> (ends a turn) and <eos>, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Inner(models.BPE(vocabulary, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "<e>", "<eos>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return load_tokenizer(directory)


def pieces(tokenizer, ids, mask):
    """The text, with what is learned in brackets."""
    parts = []
    end = 0
    for left, right in runs(mask):
        parts += [tokenizer.decode_all(ids[end:left]), "[", tokenizer.decode_all(ids[left:right]), "]"]
        end = right
    return "".join([*parts, tokenizer.decode_all(ids[end:])])


def test_a_turn_ends_at_the_templates_own_token(tmp_path):
    """A sampler stops at it too, though no EOS id names it."""
    tokenizer = tokenizer_of(tmp_path, CHATML)
    assert {tokenizer.decode_all([token]) for token in tokenizer.stop} == {"<e>", "<eos>"}
    assert tokenizer.decode_all([tokenizer.eos]) == "<eos>"
    ids, mask = encode_conversation(tokenizer.chat, [ASK, SAY, ASK, SAY])
    assert pieces(tokenizer, ids, mask) == (
        "<s>user\nhi<e>\n<s>assistant\n[yes<e>]\n<s>user\nhi<e>\n<s>assistant\n[yes<e>]\n"
    )
    ids, mask = encode_conversation(tokenizer.chat, [ASK, SAY, ASK, SAY], first=2)
    assert pieces(tokenizer, ids, mask).count("[") == 1
    assert encode_prompt(tokenizer.chat, [ASK]) == tokenizer.encode_more("<s>user\nhi<e>\n<s>assistant\n")


def test_the_prompts_ids_stay_where_a_token_would_span_its_end(tmp_path):
    """ "\\n\\n" is a token; the header ends with one new line, and the answer begins with one."""
    tokenizer = tokenizer_of(tmp_path, CHATML, merges=[("Ċ", "Ċ")])
    assert len(tokenizer.encode_more("\n\n")) == 1
    messages = [ASK, {"role": "assistant", "content": "\nyes"}]
    ids, mask = encode_conversation(tokenizer.chat, messages)
    prompt = encode_prompt(tokenizer.chat, [ASK])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    assert pieces(tokenizer, ids, mask) == "<s>user\nhi<e>\n<s>assistant\n[\nyes<e>]\n"


def test_turns_stay_as_they_were_drawn(tmp_path):
    """A template that shows thoughts in the last turn only: all turns keep them, and what follows is as written."""
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thought){% endif %}"
        "{{ m.content }}<e>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of(tmp_path, template)
    tool = {"role": "tool", "content": "3"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    ids, mask = encode_conversation(tokenizer.chat, [ASK, call, tool, SAY, ASK, SAY, ASK])
    assert pieces(tokenizer, ids, mask) == (
        "<s>user\nhi<e>\n<s>assistant\n[(thought)<e>]\n<s>tool\n3<e>\n<s>assistant\n[(thought)yes<e>]\n<s>user\nhi<e>\n"
        "<s>assistant\n[(thought)yes<e>]\n<s>user\nhi<e>\n"
    )


def test_a_template_that_marks_turns_is_taken_at_its_word(tmp_path):
    template = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    template = template.replace("{% generation %}", "{% if m.role == 'assistant' %}{%- generation -%}")
    template = template.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}")
    tokenizer = tokenizer_of(tmp_path, template)
    ids, mask = encode_conversation(tokenizer.chat, [ASK, SAY, ASK, SAY])
    expected = "<s>user\nhi<e>\n<s>assistant\n[yes]<e>\n<s>user\nhi<e>\n<s>assistant\n[yes]<e>\n"
    assert pieces(tokenizer, ids, mask) == expected
    ids, mask = encode_conversation(tokenizer.chat, [ASK, SAY, ASK, SAY], first=3)
    assert pieces(tokenizer, ids, mask) == expected.replace("[yes]", "yes", 1)


def test_answers_may_follow_without_a_header(tmp_path):
    """As in Mistral's template, which has no generation prompt and needs none."""
    template = (
        "{% for m in messages %}{{ '<s>' ~ m.content if m.role == 'user' else ' ' ~ m.content ~ '<eos>' }}{% endfor %}"
    )
    tokenizer = tokenizer_of(tmp_path, template)
    assert tokenizer.decode_all(encode_prompt(tokenizer.chat, [ASK])) == "<s>hi"
    ids, mask = encode_conversation(tokenizer.chat, [ASK, SAY])
    assert pieces(tokenizer, ids, mask) == "<s>hi[ yes<eos>]"


def test_a_template_that_ignores_tools_is_known(tmp_path):
    names = "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}"
    assert ignores_tools(tokenizer_of(tmp_path / "without", CHATML).chat)
    assert not ignores_tools(tokenizer_of(tmp_path / "with", names + CHATML).chat)


def test_tools_and_system_messages_are_the_templates(tmp_path):
    template = "{% if tools %}{{ tools | map(attribute='name') | join(',') }}{% endif %}" + CHATML
    tokenizer = tokenizer_of(tmp_path, template)
    row = {"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY], "tools": [{"name": "f"}, {"name": "g"}]}
    for tools in (row["tools"], json.dumps(row["tools"])):
        text = tokenizer.decode_all(prompt_ids(row | {"tools": tools}, tokenizer))
        assert text == "f,g<s>system\nBe brief.<e>\n<s>user\nhi<e>\n<s>assistant\n"
    assert tokenizer.decode_all(prompt_ids(row | {"tools": None}, tokenizer)).startswith("<s>system")


HEADER = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (
            "{% if messages %}",
            [ASK, SAY],
            r"the chat template of .* does not parse \(its line 1\): Unexpected end of template",
        ),
        ("{{ messages[5].content.x }}", [ASK, SAY], r"refuses message 1 \(user\): .* has no element 5"),
        (
            CHATML + "{% if messages[2] %}{{ raise_exception('three\nare too many') }}{% endif %}",
            [ASK, SAY, ASK, SAY],
            r"the chat template of .* refuses message 3 \(user\): three are too many",
        ),
        (
            "{{ 'a' + messages[0].content }}{{ 1 + 'a' }}",
            [ASK, SAY],
            r"refuses message 1 \(user\): unsupported operand",
        ),
        (HEADER, [ASK, SAY], "has no generation prompt: it ignores add_generation_prompt"),
        (CHATML.replace("<e>", ""), [ASK, SAY], r"ends message 2 \(assistant\) with no token that stops a sampler"),
        (
            CHATML.replace("<s>assistant\n", "<s>assistant\nhm"),
            [ASK, SAY],
            "does not continue its generation prompt with",
        ),
        (CHATML, [ASK, {"role": "assistant", "content": "a<e>b"}], r"message 2 \(assistant\) holds 'a<e>', at which a"),
        (CHATML, [ASK], "no message is the assistant's: there is nothing to learn"),
        (CHATML + "{% generation %}{% endgeneration %}", [ASK, SAY], "marks nothing of this"),
    ],
)
def test_one_line_for_what_a_template_cannot_do(template, messages, said, tmp_path):
    tokenizer = tokenizer_of(tmp_path, template)
    with pytest.raises(ValueError, match=said) as caught:
        encode_conversation(tokenizer.chat, messages)
    assert "\n" not in str(caught.value)


def test_a_prompt_needs_a_generation_prompt(tmp_path):
    with pytest.raises(ValueError, match="no generation prompt"):
        encode_prompt(tokenizer_of(tmp_path, HEADER).chat, [ASK])


# ------------------------------------------------------------------------------------------- dialogues with the model


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("name", NOT_DRAWN)
def test_a_reply_continues_what_was_sampled_as_the_template_does(name, role, shared):
    """Prompt, turn and reply one after another are the whole conversation as the template writes it."""
    tokenizer = load_tokenizer(shared / "chat" / name)
    chat = tokenizer.chat
    assert takes_role(chat, "tool") == (name not in ("gemma", "phi3"))
    if not takes_role(chat, role):
        return
    reply = [{"role": role, "name": "add", "content": f"12 {MARK} und\n"}]
    turn = tokenizer.encode_more("yes")
    end = [
        token for token in tokenizer.stop if tokenizer.decode_all([token]) in chat.render([ASK, SAY, ASK], None, True)
    ]
    prompt = encode_prompt(chat, [ASK])
    want = encode_prompt(chat, [ASK, SAY, *reply])
    assert prompt + turn + end[:1] + encode_reply(chat, [ASK], True, reply) == want
    assert prompt + turn + encode_reply(chat, [ASK], False, reply) == want
    # Further on in the conversation it is the same: what was sampled before does not matter.
    long = [ASK, {"role": "assistant", "content": f"{MARK}</think>no"}, ASK]
    assert encode_reply(chat, long, True, reply) == encode_reply(chat, [ASK], True, reply)


def test_several_replies_are_written_at_once(shared):
    chat = load_tokenizer(shared / "chat" / "qwen3").chat
    replies = [{"role": "tool", "name": "add", "content": text} for text in ("1", "2")]
    both = encode_reply(chat, [ASK], True, replies)
    text = chat.render([ASK, SAY, *replies], None, True).partition("yes<|im_end|>")[2]
    assert both == chat.encode(text)
    assert text.count("<tool_response>") == 2
    assert text.endswith("<|im_start|>assistant\n")


def test_a_template_that_refuses_a_role_says_so(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = tokenizer_of(tmp_path, template + CHATML.removeprefix("{% for m in messages %}"))
    assert not takes_role(tokenizer.chat, "tool")
    with pytest.raises(ValueError, match=r"refuses message 3 \(tool\): no tools"):
        encode_reply(tokenizer.chat, [ASK], True, [{"role": "tool", "content": "1"}])
