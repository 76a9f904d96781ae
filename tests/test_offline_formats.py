"""Every row format, plain and conversational, through the reader of the script that eats it: what it learns from."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from experiments.common import data
from experiments.common.preference_methods import METHODS
from experiments.common.preference_rows import _pair_with_gold, collate_rows, read_rows
from experiments.common.settings import Data
from experiments.reward_model import completions_of, read_row
from models import tiny
from rljax.data.demonstrations import collate
from rljax.data.examples import demonstration, steps
from rljax.data.steps import collate_steps
from rljax.data.tokenizer import load_tokenizer
from test_grpo_experiment import RAW, write_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}-{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a-{% endif %}"
)
LETTERS = "abcdefghij"


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tiny.write(tmp_path_factory.mktemp("formats") / "model", RAW, tiny.tensors_of(RAW))
    write_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(directory)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(files=(str(path),), eval_size=2)


def learned(traj, tokenizer):
    """The text of each row's decisions, an end of text as a dot."""
    rows = zip(np.asarray(traj.actions), np.asarray(traj.mask), strict=True)
    return ["".join("." if t == 2 else tokenizer.decode([t]) for t in actions[mask].tolist()) for actions, mask in rows]


def sorted_sides(found):
    return [*found.train, *found.eval]


DEMONSTRATIONS = {
    "prompt and completion": lambda c: {"prompt": f"q{c}", "completion": f" yes{c}"},
    "prompt and completion, chat": lambda c: {"prompt": user(f"q{c}"), "completion": assistant(f" yes{c}")},
    "messages": lambda c: {"messages": [*user(f"q{c}"), *assistant(f" yes{c}")]},
}


@pytest.mark.parametrize("make", DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations(make, tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [make(c) for c in LETTERS])
    found = data.read_examples(settings, demonstration, tokenizer, 60, 0)
    traj = collate(sorted_sides(found), 60)
    assert sorted(learned(traj, tokenizer)) == [f" yes{c}." for c in LETTERS]


def test_texts(tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [{"text": f"once {c}"} for c in LETTERS])
    found = data.read_examples(settings, demonstration, tokenizer, 60, 0)
    assert sorted(learned(collate(sorted_sides(found), 60), tokenizer)) == [f"once {c}." for c in LETTERS]


def test_conversations_of_two_turns_teach_what_the_assistant_says(tokenizer, tmp_path):
    rows = [{"messages": [*user(f"q{c}"), *assistant(f"one{c}"), *user("b"), *assistant("two")]} for c in LETTERS]
    found = data.read_examples(write(tmp_path / "rows.jsonl", rows), demonstration, tokenizer, 60, 0)
    assert sorted(learned(collate(sorted_sides(found), 60), tokenizer)) == [f"one{c}.two." for c in LETTERS]


PREFERENCES = {
    "texts": lambda c: {"prompt": f"q{c}", "chosen": f" yes{c}", "rejected": f" no{c}"},
    "chat": lambda c: {"prompt": user(f"q{c}"), "chosen": assistant(f" yes{c}"), "rejected": assistant(f" no{c}")},
    "chat, prompt within": lambda c: {
        "chosen": [*user(f"q{c}"), *assistant(f" yes{c}")],
        "rejected": [*user(f"q{c}"), *assistant(f" no{c}")],
    },
}


@pytest.mark.parametrize("make", PREFERENCES.values(), ids=PREFERENCES)
def test_preferences(make, tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [make(c) | {"margin": 0.5} for c in LETTERS])
    for row in sorted_sides(data.read_examples(settings, read_row, tokenizer, 60, 0)):
        assert row.margin == 0.5
        assert len(completions_of(row)) == 2
    for loss in ("sigmoid", "odpo"):
        rows = sorted_sides(read_rows(settings, METHODS[loss], tokenizer, 60, 0))
        pairs = collate_rows(rows, METHODS[loss], 20, 20)
        chosen, rejected = learned(pairs.chosen, tokenizer), learned(pairs.rejected, tokenizer)
        assert sorted(chosen) == [f" yes{c}." for c in LETTERS]
        assert [text.replace("yes", "no") for text in chosen] == rejected
        assert (pairs.margin is None) == (loss == "sigmoid")
    judged = sorted_sides(read_rows(settings, METHODS["kto"], tokenizer, 60, 0))
    unpaired = collate_rows(judged, METHODS["kto"], 20, 20)
    assert unpaired.desirable.sum() == 10
    for text, desirable, other in zip(
        learned(unpaired.traj, tokenizer), unpaired.desirable, learned(unpaired.mismatched, tokenizer), strict=True
    ):
        assert ("yes" in text) == desirable
        assert text[-2] != other[-2]  # of another prompt


@pytest.mark.parametrize("make", PREFERENCES.values(), ids=PREFERENCES)
def test_what_was_cut_has_no_end_of_turn(make, tokenizer):
    """The chosen one of a pair, and the second of a ranking."""
    pair = read_row(make("a") | {"ended": [False, True]}, tokenizer)
    assert learned(collate(completions_of(pair), 40), tokenizer) == [" yesa", " noa."]
    ranked = RANKINGS["texts" if isinstance(make("a")["chosen"], str) else "chat"]("a")
    row = read_row(ranked | {"ended": [True, False, True]}, tokenizer)
    assert learned(collate(completions_of(row), 40), tokenizer) == [" best.", " good", " bad."]
    for wrong in (None, [True], [1, 0], "no"):
        with pytest.raises(ValueError, match=r"column 'ended' is .*; legal: a list of true and false, one for each"):
            read_row(make("a") | {"ended": wrong}, tokenizer)


JUDGMENTS = {
    "texts": lambda c: {"prompt": f"q{c}", "completion": f" yes{c}", "label": c < "e"},
    "chat": lambda c: {"prompt": user(f"q{c}"), "completion": assistant(f" yes{c}"), "label": c < "e"},
}


@pytest.mark.parametrize("make", JUDGMENTS.values(), ids=JUDGMENTS)
def test_judgments(make, tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [make(c) for c in LETTERS])
    rows = sorted_sides(read_rows(settings, METHODS["bco"], tokenizer, 60, 0))
    unpaired = collate_rows(rows, METHODS["bco"], 20, 20)
    assert {
        text[-2]: bool(d) for text, d in zip(learned(unpaired.traj, tokenizer), unpaired.desirable, strict=True)
    } == {c: c < "e" for c in LETTERS}


RANKINGS = {
    "texts": lambda c: {"prompt": f"q{c}", "completions": [" best", " good", " bad"]},
    "chat": lambda c: {"prompt": user(f"q{c}"), "completions": [assistant(t) for t in (" best", " good", " bad")]},
}


@pytest.mark.parametrize("make", RANKINGS.values(), ids=RANKINGS)
def test_rankings(make, tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [make(c) for c in LETTERS])
    for row in sorted_sides(data.read_examples(settings, read_row, tokenizer, 60, 0)):
        assert learned(collate(completions_of(row), 40), tokenizer) == [" best.", " good.", " bad."]


TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_rankings_and_gold_are_read_with_the_tools_of_their_row(tokenizer, tmp_path):
    """And where there is no prompt, that is said."""
    row = RANKINGS["chat"]("a") | {"tools": TOOLS}
    for example in read_row(row, tokenizer):
        assert example.columns["tools"] == TOOLS
    gold = {"prompt": user("q"), "chosen": assistant("a"), "rejected": assistant("b"), "gold": assistant("c")}
    rows = [gold | {"tools": TOOLS}, {"prompt": "q", "chosen": "a", "rejected": "b", "gold": "c"}]
    for made, chat in zip(rows, (False, True), strict=True):
        settings = dataclasses.replace(write(tmp_path / "rows.jsonl", [made] * 2), chat=chat)
        for found in sorted_sides(read_rows(settings, METHODS["tpo"], tokenizer, 60, 0)):
            assert learned(collate(found.completions, 40), tokenizer) == ["a.", "b.", "c."]
            assert found.completions[2].columns.get("tools") == made.get("tools")
    for read, bad in [
        (read_row, {"question": "q", "completions": ["a", "b"]}),
        (_pair_with_gold, {"chosen": "q a", "rejected": "q b", "gold": "q c"}),
    ]:
        with pytest.raises(ValueError, match=r"no column 'prompt'; the row has (question|chosen)"):
            read(bad, tokenizer)


STEPS = {
    "texts": lambda c: {"prompt": f"q{c}", "completions": ["one", "two"], "labels": [True, False]},
    "chat": lambda c: {
        "prompt": user(f"q{c}"),
        "completions": [*assistant("one"), *assistant("two")],
        "labels": [True, False],
    },
}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_steps(make, tokenizer, tmp_path):
    settings = write(tmp_path / "rows.jsonl", [make(c) for c in LETTERS])
    found = data.read_examples(settings, partial(steps, separator=","), tokenizer, 60, 0)
    traj = collate_steps(sorted_sides(found), 40)
    assert learned(traj, tokenizer) == ["one,two,"] * 10
    ends = np.asarray(traj.step_ends)
    assert learned(traj.replace(mask=ends), tokenizer) == [",,"] * 10
    assert np.asarray(traj.rewards)[ends].tolist() == [1.0, 0.0] * 10
