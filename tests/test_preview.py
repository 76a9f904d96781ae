"""preview.py: rows of every format as ids and masks, and what became of those that do not fit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import preview
from experiments.common.settings import Data
from rljax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "tests" / "rows"  # ten rows of every format, plain and conversational
CHATML = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)
TEMPLATES = ("gemma", "llama3", "phi3", "qwen2_5", "qwen3")


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    """The tokenizer of stories260k, with a chat template."""
    directory = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copyfile(shared / "models" / "stories260k" / name, directory / name)
    (directory / "chat_template.jinja").write_text(CHATML)
    return str(directory)


def look(model, *files, rows=10, kind="auto", **options):
    data = Data(files=tuple(map(str, files)), **options)
    return preview.main(preview.Config(model=model, data=data, rows=rows, kind=kind, json=True))


def texts(record, tokenizer):
    """(what is read only, what is learned) of a record of one turn."""
    ids, mask = record["ids"], record["mask"]
    cut = mask.index(1)
    assert all(mask[cut:])
    return tokenizer.decode_all(ids[:cut]), tokenizer.decode_all(ids[cut:])


@pytest.mark.parametrize("name", sorted(file.stem for file in ROWS.glob("*.jsonl")))
def test_every_format_is_read(name, model, capsys):
    records = look(model, ROWS / f"{name}.jsonl")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == records
    assert len(records) == 10
    assert {record["status"] for record in records} == {"kept"}
    for record in records:
        for text in (record["chosen"], record["rejected"]) if "chosen" in record else (record,):
            assert len(text["ids"]) == len(text["mask"]) == text["prompt_tokens"] + text["completion_tokens"]
            assert any(text["mask"]) == ("prompt" not in name.split("_") or "completion" in name)
            assert not any(text["mask"][: text["prompt_tokens"]])


ASKED = "What color is the sky?"
EXPECTED = {  # of the first row: what is read only, and what is learned
    "prompt_completion": (f"<s> {ASKED}\n", "Blue.</s>"),
    "prompt_completion_chat": (f"<s>system\nBe brief.</s>\n<s>user\n{ASKED}</s>\n<s>assistant\n", "Blue.</s>"),
    "unpaired": (f"<s> {ASKED}\n", "Green.</s>"),
    "unpaired_chat": (f"<s>user\n{ASKED}</s>\n<s>assistant\n", "Green.</s>"),
    "text": ("<s>", f"{ASKED} Blue.</s>"),
    "stepwise": (f"<s> {ASKED}\n", "Let me think.\nBlue.\n"),
    "stepwise_chat": (f"<s>user\n{ASKED}</s>\n<s>assistant\n", "Let me think.\nBlue.\n"),
}


def without_spaces(pair):
    """This tokenizer puts a space where a text begins."""
    return tuple(text.replace(" ", "") for text in pair)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_learned(name, model):
    record = look(model, ROWS / f"{name}.jsonl", rows=1)[0]
    assert without_spaces(texts(record, load_tokenizer(model))) == without_spaces(EXPECTED[name])


@pytest.mark.parametrize("name", ["preference", "preference_chat", "preference_implicit", "preference_implicit_chat"])
def test_the_completions_of_a_pair_have_one_prompt(name, model):
    tokenizer = load_tokenizer(model)
    for record in look(model, ROWS / f"{name}.jsonl"):
        chosen, rejected = record["chosen"], record["rejected"]
        cut = chosen["prompt_tokens"]
        assert chosen["ids"][:cut] == rejected["ids"][:cut]
        assert chosen["ids"][cut] != rejected["ids"][cut] or "implicit" not in name or "chat" in name
        assert all(text["ids"][-1] == tokenizer.eos for text in (chosen, rejected))
        assert record["margin"] == (None if name != "preference" else pytest.approx(record["margin"]))


def test_steps_end_where_their_labels_stand(model):
    for record in look(model, ROWS / "stepwise.jsonl"):
        ends = [i for i, is_end in enumerate(record["step_ends"]) if is_end]
        assert [record["labels"][i] for i in ends] in ([1.0, 1.0], [1.0, 1.0, 0.0])
        assert ends[-1] == len(record["ids"]) - 1


def test_a_kind_may_be_asked_for(model):
    (record,) = look(model, ROWS / "prompt_completion.jsonl", rows=1, kind="prompt")
    assert record["completion_tokens"] == 0
    assert not any(record["mask"])
    (record,) = look(model, ROWS / "messages.jsonl", rows=1, kind="prompt")
    assert load_tokenizer(model).decode_all(record["ids"]).endswith("assistant\n")


# -------------------------------------------------------------------------------------------------- recorded by TRL


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_recorded_ids(name, shared, tmp_path):
    """The ids TRL trains on; its masks, but for what no sampler draws, are in tests/data/test_chat.py."""
    cases = json.loads((shared / "chat" / name / "cases.json").read_text())
    cases = [case for case in cases.values() if "ids" in case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": case["conversation"]}) + "\n" for case in cases))
    records = look(str(shared / "chat" / name), file)
    assert len(records) == len(cases) >= 7
    for record, case in zip(records, cases, strict=True):
        assert record["ids"] == case["ids"]
        assert all(theirs >= ours for theirs, ours in zip(case["assistant_mask"], record["mask"], strict=True))


# ------------------------------------------------------------------------------------------ what is too long, or wrong


@pytest.mark.parametrize("overlong", ["cut_left", "cut_right", "drop", "error"])
def test_what_is_too_long(overlong, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [("Once upon a time", " he"), ("He", " and I went on and on"), ("One two three four five", " he")]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    whole = look(model, file)
    limit = 8
    untouched = {"cut_left": "completion_tokens", "cut_right": "prompt_tokens"}
    records = look(model, file, max_tokens=limit, overlong=overlong)
    assert [len(record["ids"]) > limit for record in whole] == [False, True, True]
    for before, after in zip(whole, records, strict=True):
        if len(before["ids"]) <= limit:
            assert after == before
        elif overlong in ("drop", "error") or before[untouched[overlong]] >= limit:  # nothing would be left to cut
            assert after["status"] == "dropped"
            assert after["why"] == f"{len(before['ids'])} tokens; at most {limit} tokens"
        else:
            assert after["status"] == overlong
            kept = before["ids"][-limit:] if overlong == "cut_left" else before["ids"][:limit]
            assert after["ids"] == kept


def test_rows_that_cannot_be_read_are_named_and_the_others_shown(model, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": null, "completion": "b"}\n{"x": 1}\n')
    with pytest.raises(ValueError, match="2 of 3 rows cannot be read"):
        look(model, file)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["status"] for record in records] == ["kept", "cannot be read", "cannot be read"]
    assert records[1]["place"] == f"{file}, line 3"
    assert "'prompt' holds null" in records[1]["why"]
    assert "legal: " in records[2]["why"]


def test_what_scripts_refuse_or_leave_out_is_said(model, tmp_path, capsys):
    """A plain row after a conversation; equal completions."""
    chat = [{"role": "user", "content": "a"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": chat}, {"prompt": "a"})))
    with pytest.raises(ValueError, match=r"1 of 2 rows .* line 2: plain text, but .*line 1 is a conversation"):
        look(model, file)
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    (record,) = look(model, file)
    assert (record["status"], record["why"]) == ("left out", "its completions are equal")


def test_rankings_gold_and_labels_that_are_missing(model, tmp_path, capsys):
    rows = [
        {"prompt": "a", "completions": ["best", "worst"], "ended": [True, False]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "gold": "gold"},
        {"prompt": "a", "completions": ["one", "two"], "labels": [None, 1]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranking, pair, steps = look(model, file)
    tokenizer = load_tokenizer(model)
    assert [texts(text, tokenizer)[1].strip() for text in ranking["completions"]] == ["best</s>", "worst"]
    assert texts(pair["gold"], tokenizer)[1].strip() == "gold</s>"
    assert [label for label, ends in zip(steps["labels"], steps["step_ends"], strict=True) if ends] == [None, 1.0]
    assert "NaN" not in capsys.readouterr().out
    preview.main(preview.Config(model=model, data=Data(files=(str(file),))))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("place")] == [["place", "1"], ["place", "2"]]


def test_a_reward_model_has_a_tokenizer_too(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert look(str(tmp_path / "model"), ROWS / "preference.jsonl", rows=1)


def test_of_rows_that_cannot_be_read_for_one_reason_the_first_is_shown(model, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"x": 1}\n' * 12 + '{"prompt": null, "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"13 of 14 rows cannot be read; the first: .*line 1: "):
        preview.main(preview.Config(model=model, data=Data(files=(str(file),)), rows=3))
    lines = capsys.readouterr().out.splitlines()
    shown = [line.removeprefix(f"{file}, line ").split()[0] for line in lines if line.startswith(str(file))]
    assert shown == ["1", "13", "14"]
    reason = lines[0].split("cannot be read: ")[1].removesuffix(")")
    assert [line for line in lines if "more rows" in line] == [f"the same for 11 more rows: {reason}"]


def test_in_a_pipe_ids_and_masks_can_be_read(model):
    command = [sys.executable, ROOT / "experiments" / "preview.py", "--model", model]
    command += ["--data.files", ROWS / "unpaired.jsonl", "--rows", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{ROWS / 'unpaired.jsonl'}, line 1 (unpaired preference, kept)"
    (record,) = look(model, ROWS / "unpaired.jsonl", rows=1)
    read, learned = texts(record, load_tokenizer(model))
    assert without_spaces((lines[2], "")) == without_spaces((f"text:{read}[{learned}]".replace("\n", "⏎"), ""))
    assert lines[3] == f"ids: {' '.join(map(str, record['ids']))}"
    assert lines[4] == f"mask: {' '.join(map(str, record['mask']))}"
    assert lines[-1].startswith("10 rows: 10 kept; at most ")


def test_what_is_learned_is_green(model):
    (record,) = look(model, ROWS / "stepwise.jsonl", rows=1)
    shown = preview.colored(record, load_tokenizer(model))
    assert "Let me think" in shown.plain
    styles = [span.style for span in shown.spans]
    assert sum("green" in style for style in styles) == sum(record["mask"])
    assert sum("underline" in style for style in styles) == 2


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_row_controls_no_terminal(is_terminal, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "is_interactive", lambda: is_terminal)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "\x1b[2J\u202eb"}) + "\n")
    preview.main(preview.Config(model=model, data=Data(files=(str(file),))))
    out = capsys.readouterr().out
    assert "(prompt-completion, kept)" in out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\ufffd" in out
