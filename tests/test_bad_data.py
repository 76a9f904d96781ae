"""What a new user's first files and models may be like: each is read, or is one line that says what to do."""

import dataclasses
import gzip
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from experiments import dpo, ppo, score
from experiments.common import data, hub, offline, settings
from experiments.common.inputs import inputs_of
from experiments.common.rows import make_shape, read_rows, read_template, unescape
from experiments.common.settings import Data, Rows
from experiments.tools import generate
from rljax.data.examples import comparison, demonstration, prompt_ids, steps
from rljax.data.files import read_table
from rljax.data.tokenizer import load_tokenizer
from rljax.models import hf
from rljax.models.stored import stored_files
from rljax.train import distributed

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    """stories260k, with a chat template."""
    directory = tmp_path_factory.mktemp("data") / "model"
    shutil.copytree(shared / "models" / "stories260k", directory)
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(files, tokenizer, template="{prompt}", max_tokens=64, eval_prompts=2, seed=0, **options):
    read = data.read_files(files)
    return data.read_prompts(read, template, tokenizer, max_tokens, eval_prompts, seed, Rows(**options))


def examples(tokenizer, *files, read=demonstration, seed=0, context=64, **options):
    return data.read_examples(Data(files=tuple(map(str, files)), **options), read, tokenizer, context, seed)


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, "answer": "4"}, "column 'prompt' holds null"),
        ({"question": "2+2?"}, "no column 'prompt'; the row has question|column"),
        ({"prompt": ""}, None),
        ({"prompt": [{"role": "user", "content": None}]}, r"column 'prompt', message 1 has as its content null"),
        ({"prompt": [{"content": "hi"}]}, "column 'prompt', message 1 has no role"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "has the part .*legal: {'type': 'text'"),
        ({"prompt": 5}, "column 'prompt' holds a int, 5; legal: a text, or a list of messages"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "ends with a message of",
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_named(row, message, tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", {"prompt": "a" if isinstance(row.get("prompt"), str) else "b"}, row)
    if isinstance(row.get("prompt"), list):
        file = write(tmp_path / "rows.jsonl", {"prompt": [{"role": "user", "content": "hi"}]}, row)
    if message is None:  # this tokenizer begins every text with <s>
        assert len(prompts(file, tokenizer)[0]) == 1
        return
    with pytest.raises(ValueError, match=rf"^{file}, line 2: .*({message})"):
        prompts(file, tokenizer)


@pytest.mark.parametrize("label", [-1, 5, 1.01, float("nan"), float("inf"), "1", 10**400])
def test_labels_of_steps_and_margins_are_in_their_range(label, tokenizer):
    solution = {"prompt": "a", "completions": ["b", "c"]}
    with pytest.raises(ValueError, match=r"column 'labels' is .*; legal: true, false, numbers from 0 to 1, or null"):
        steps(solution | {"labels": [True, label]}, tokenizer)
    assert 0.25 in steps(solution | {"labels": [0.25, None]}, tokenizer).labels
    if label not in (-1, 5, 1.01):
        with pytest.raises(ValueError, match=r"column 'margin' is .*; legal: a finite number"):
            comparison({"prompt": "a", "chosen": "b", "rejected": "c", "margin": label}, tokenizer)


def test_a_column_of_the_template_that_is_null_in_some_rows(tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", {"q": "a", "hint": "b"}, {"q": "a", "hint": None})
    assert len(prompts(file, tokenizer, "{q}")[0]) == 2  # both have one prompt
    with pytest.raises(
        ValueError, match=rf"^{file}, line 2: column 'hint' is null; legal in a template: text and numbers"
    ):
        prompts(file, tokenizer, "{q} {hint}")


def test_texts_and_conversations_in_one_file_or_row(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    file = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": chat})
    with pytest.raises(ValueError, match=rf"line 2: a conversation, but {file}, line 1 is plain text"):
        prompts(file, tokenizer)
    with pytest.raises(ValueError, match="text in prompt, a conversation in chosen, rejected; legal: all texts or all"):
        comparison({"prompt": "hi", "chosen": chat, "rejected": chat}, tokenizer)


def test_messages_and_content_parts_go_through_the_chat_template(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    asked = [{"role": "user", "content": parts}]
    said = [*asked, {"role": "assistant", "content": "4"}]
    expected = tokenizer.encode_more("<s>user: What is 2+2?</s><s>assistant: ")
    for row in ({"prompt": asked}, {"messages": asked}, {"messages": said}):
        train, evaluation = prompts(write(tmp_path / "rows.jsonl", row), tokenizer)
        assert train.encoded == evaluation.encoded == [expected]
    shape = make_shape("{q}", "", Rows(chat=True, system="Be brief."))
    assert prompt_ids(shape({"q": "2+2?"}), tokenizer) == tokenizer.encode_more(
        "<s>system: Be brief.</s><s>user: 2+2?</s><s>assistant: "
    )
    own = {"messages": [{"role": "system", "content": "Sing."}, *said]}
    assert shape({"q": ""} | own)["messages"] == own["messages"]
    with pytest.raises(ValueError, match="a system message, but column 'prompt' is no conversation"):
        make_shape("", "", Rows(system="Be brief."))({"prompt": "a"})


def test_a_conversation_without_a_chat_template(shared, tmp_path):
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    file = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(ValueError, match=rf"^{file}, line 1: a conversation, but the model has no chat template"):
        prompts(file, tokenizer)


def test_rows_as_chats_in_every_format():
    shape = make_shape("", "", Rows(chat=True))
    user, assistant = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))
    assert shape({"prompt": "x", "completion": "x"}) == {"prompt": user, "completion": assistant}
    assert shape({"prompt": "x", "chosen": "x", "rejected": "x"})["rejected"] == assistant
    assert shape({"prompt": "x", "completions": ["x", "x"], "labels": [1, 0]})["completions"] == assistant * 2
    assert shape({"prompt": "x", "completions": ["x", "x"]})["completions"] == [assistant, assistant]  # a ranking
    assert shape({"messages": user}) == {"messages": user}
    with pytest.raises(ValueError, match="column 'text' has no user's message"):
        shape({"text": "x"})


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"\neq {x}", r"\neq {x}"),
        (r"Question: {q}\nAnswer:", "Question: {q}\nAnswer:"),
        (r"a\n\nb\n", "a\n\nb\n"),
        (r"\nu, \nabla f, \not, \nnot", "\\nu, \\nabla f, \\not, \nnot"),
        (r"\n1\n{q}", "\n1\n{q}"),
        ("a\nb", "a\nb"),
        (r"\null \noindent \npreceq\nleqslant\n\nsupseteq", "\\null \\noindent \\npreceq\\nleqslant\n\\nsupseteq"),
        (r"{q}\nless is more\nothing", "{q}\\nless is more\nothing"),
    ],
)
def test_only_a_bare_n_is_a_new_line(written, read):
    assert unescape(written) == read


def test_one_line_says_which_n_is_left_as_it_is(capsys):
    unescape(r"{q}\nAnswer:")
    assert capsys.readouterr().out == ""
    unescape(r"{q}\ni think \neq\nA \ni")
    out = capsys.readouterr().out
    assert out.startswith(r"\neq, \ni in ")
    assert "left as it is" in out
    assert "@FILE" in out


def test_a_template_of_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "template.txt").write_text("\\nabla {q}\\n, in \\boxed{{}}\n")
    assert read_template(f"@{tmp_path / 'template.txt'}")({"q": 1}) == "\\nabla 1\\n, in \\boxed{}"
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.txt of a template"):
        read_template(f"@{tmp_path / 'absent.txt'}")


# --------------------------------------------------------------------------------------------- files, split, mixture


def test_a_mark_gzip_and_an_array_are_read(tokenizer, tmp_path):
    rows = [{"prompt": f"Once {i}"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {
        "mark.jsonl": b"\xef\xbb\xbf" + lines,
        "z.jsonl.gz": gzip.compress(lines),
        "a.json": json.dumps(rows).encode(),
    }
    read = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        read.append(prompts(str(tmp_path / name), tokenizer)[0].columns)
    assert read[0] == read[1] == read[2]
    assert sorted(row["prompt"] for row in read[0]) < [row["prompt"] for row in rows]


def test_equal_prompts_are_on_one_side_and_counted(tokenizer, tmp_path, capsys):
    rows = [{"prompt": "the same", "n": i} for i in range(10)] + [{"prompt": f"one of {i}", "n": i} for i in range(10)]
    file = write(tmp_path / "rows.jsonl", *rows)
    for seed in range(8):
        train, evaluation = prompts(file, tokenizer, eval_prompts=5, seed=seed)
        assert len(train) + len(evaluation) == 20
        assert not {row["prompt"] for row in train.columns} & {row["prompt"] for row in evaluation.columns}
        assert "9 repeat the prompt of another, and are on its side" in capsys.readouterr().out
    pairs = [{"prompt": "p", "completion": f"{i}"} for i in range(5)] + [{"prompt": "q", "completion": "0"}]
    found = examples(tokenizer, write(tmp_path / "pairs.jsonl", *pairs), eval_size=3)
    assert {len(found.train), len(found.eval)} == {1, 5}


def test_answers_that_begin_alike_are_of_one_prompt(tokenizer, tmp_path):
    """Of pairs without a prompt; prompts that are given are other prompts where one begins as another."""
    question = "Q: what is best? A:"
    answers = [("red", "red wine"), ("red", "blue"), ("green tea", "green"), ("you", "your dog")]
    rows = [{"chosen": f"{question} {a} {i}", "rejected": f"{question} {b}"} for i, (a, b) in enumerate(answers)]
    rows += [{"chosen": f"Where is {i}? Here", "rejected": f"Where is {i}? There"} for i in range(9)]
    file = write(tmp_path / "rows.jsonl", *rows)
    for seed in range(6):
        found = examples(tokenizer, file, read=comparison, seed=seed, eval_size=4)
        of_question = [[one.chosen.columns["chosen"].startswith(question) for one in side] for side in found]
        assert sum(map(any, of_question)) == 1
        assert len(found.train) + len(found.eval) == len(rows)
    given = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("Q", "Q:", "Q: w", "Q: wh")]
    found = examples(tokenizer, write(tmp_path / "given.jsonl", *given), read=comparison, eval_size=2)
    assert (len(found.train), len(found.eval)) == (2, 2)
    unlike = [
        {"chosen": f"{letter} {letter}", "rejected": "zz"} for letter in "abcdef"
    ]  # no prompt: only <s> is common
    found = examples(tokenizer, write(tmp_path / "unlike.jsonl", *unlike), read=comparison, eval_size=2)
    assert (len(found.train), len(found.eval)) == (4, 2)


def test_conversations_of_a_pair_begin_with_one_prompt(tokenizer):
    def talk(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    found = comparison({"chosen": talk("A?", "a"), "rejected": talk("A?", "b", "Why?", "c")}, tokenizer)
    assert found.chosen.prompt == found.rejected.prompt
    for other, place in [(("B?", "b"), "message 1"), (("A?", "a", "So?", "c"), "message 3")]:
        with pytest.raises(ValueError, match=rf"part at {place} \(user\): they answer different prompts"):
            comparison({"chosen": talk("A?", "a", "Why?", "b"), "rejected": talk(*other)}, tokenizer)


def test_completions_that_are_equal_are_left_out_and_an_empty_text_is_an_error(tokenizer, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "x", "rejected": "x" if i < 3 else "y"} for i in range(8)]
    found = examples(tokenizer, write(tmp_path / "rows.jsonl", *rows), read=comparison, eval_size=2)
    assert len(found.train) + len(found.eval) == 5
    assert "3 left out, whose completions are equal" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the completions of every one of 3 rows are equal"):
        examples(tokenizer, write(tmp_path / "ties.jsonl", *rows[:3]), read=comparison)
    with pytest.raises(ValueError, match="line 2: column 'text' is empty"):
        examples(tokenizer, write(tmp_path / "texts.jsonl", {"text": "a"}, {"text": ""}))


def test_one_line_says_that_bos_stands_twice(tokenizer, tmp_path, capsys):
    rows = [{"prompt": "<s>Hi", "completion": "a"}, {"prompt": "Hi", "completion": "a"}]
    found = examples(tokenizer, write(tmp_path / "rows.jsonl", *rows), eval_size=1)
    assert sorted(one.prompt[:2] == [1, 1] for side in found for one in side) == [False, True]
    assert "warning: 1 of 2 rows begin with '<s>' twice: the text holds it" in capsys.readouterr().out
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    examples(tokenizer, write(tmp_path / "chats.jsonl", {"messages": chat}, {"messages": chat}), eval_size=1)
    assert "twice" not in capsys.readouterr().out


def test_texts_are_split_by_the_whole_text(tokenizer, tmp_path):
    found = examples(
        tokenizer, write(tmp_path / "rows.jsonl", *({"text": f"Once {i}"} for i in range(10))), eval_size=3
    )
    assert (len(found.train), len(found.eval)) == (7, 3)


def test_files_with_weights_have_their_share_of_the_draws(tokenizer, tmp_path):
    one = write(tmp_path / "one.jsonl", *({"prompt": f"one {i}"} for i in range(12)))
    two = write(tmp_path / "two.jsonl", *({"prompt": f"two {i}"} for i in range(30)))
    train, evaluation = prompts((f"{one}=3", f"{two}=1"), tokenizer, eval_prompts=2)
    drawn = train.draw(0, len(train)).columns
    share = sum("one" in row["prompt"] for row in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=1 / len(drawn))
    assert {row["prompt"] for row in drawn} | {row["prompt"] for row in evaluation.columns} == {
        row["prompt"] for file in (one, two) for row in read_table(file).rows
    }
    again, _ = prompts((f"{one}=3", f"{two}=1"), tokenizer, eval_prompts=2)
    assert again.draw(17, 9).columns == train.draw(0, 26).columns[17:]  # a function of seed and cursor alone
    for files, message in [
        ((f"{one}=3", two), "weights for some files only"),
        ((f"{one}=-1", f"{two}=1"), "must be a positive number"),
        ((f"{one}=1e-6", f"{two}=1"), "would repeat rows"),
        ((f"{one}=1", f"{one}=3"), rf"{one} is named twice; legal: once"),
    ]:
        with pytest.raises(ValueError, match=message):
            prompts(files, tokenizer)
    unweighted, _ = prompts((one, two), tokenizer, eval_prompts=2)
    assert len(unweighted) == 40


def test_over_long_rows(tokenizer, tmp_path, capsys):
    rows = [
        {"prompt": "a b c d e f g h i j k", "completion": "x"},
        *({"prompt": f"p{i}", "completion": "y"} for i in range(6)),
    ]
    file = write(tmp_path / "rows.jsonl", *rows)
    read = partial(examples, tokenizer, file, max_tokens=12, eval_size=1)
    sizes = {}
    for overlong in ("drop", "cut_left", "cut_right"):
        found = read(overlong=overlong)
        sizes[overlong] = len(found.train) + len(found.eval)
        assert all(len(one.prompt) + len(one.completion) <= 12 for one in found.train + found.eval)
    assert sizes["drop"] == 6
    assert sizes["cut_left"] == 7
    printed = capsys.readouterr().out
    assert "1 dropped, longer than 12 tokens" in printed
    assert "1 cut to that (cut_left)" in printed
    with pytest.raises(ValueError, match=rf"{file}, line 1: \d+ tokens; at most 12 tokens"):
        read(overlong="error")
    with pytest.raises(ValueError, match="every row is longer than 2 tokens; the shortest has"):
        read(max_tokens=2)
    with pytest.raises(ValueError, match="at most the model's context, 64"):
        read(max_tokens=65)
    with pytest.raises(ValueError, match="which rows"):
        examples(tokenizer)


def test_pairs_keep_one_prompt_when_it_is_cut(tokenizer, tmp_path):
    row = {"prompt": "a b c d e f g h i j k l m n", "chosen": "x", "rejected": "x y z"}
    file = write(tmp_path / "rows.jsonl", row)
    (pair,) = examples(tokenizer, file, read=comparison, max_tokens=14, overlong="cut_left").train
    assert (
        pair.chosen.prompt
        == pair.rejected.prompt
        == comparison(row, tokenizer).chosen.prompt[-len(pair.chosen.prompt) :]
    )
    assert max(len(one.prompt) + len(one.completion) for one in pair[:2]) == 14


def test_draws_are_a_function_of_seed_and_cursor():
    items = list("abcdefg")
    assert data.draw(items, 3, 0, 20) == data.draw(items, 3, 0, 11) + data.draw(items, 3, 11, 9)
    assert data.draw(items, 3, 0, 20) != data.draw(items, 4, 0, 20)


# ---------------------------------------------------------------------------------------------------- model directories


def broken(model, directory, name, content):
    shutil.copytree(model, directory)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    return directory


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN = {
    "no tokenizer": ("tokenizer.json", None, r"has no tokenizer: none of tokenizer\.json, .*; copy it from the model"),
    "a pointer": (
        "tokenizer.json",
        LFS,
        r"tokenizer\.json is a Git LFS pointer, not the file itself; get it with: git",
    ),
    "cut short": (
        "tokenizer.json",
        b'{"version": "1.0", "mod',
        r"tokenizer\.json is not JSON .*: cut short\?; copy or",
    ),
    "empty": ("generation_config.json", b"", r"generation_config\.json is empty; copy or download it again"),
    "a list": ("generation_config.json", b"[]", r"generation_config\.json holds a list; legal: an object"),
    "config": ("config.json", b"{", r"config\.json is not JSON .*: cut short\?"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_directory_is_one_line(name, content, message, model, tmp_path):
    directory = broken(model, tmp_path / "model", name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data.load_tokenizer_and_context(str(directory))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"), [(b"{}", "has no weight_map"), (b"", "is empty; copy"), (LFS, "is a Git LFS pointer")]
)
def test_a_broken_index_is_one_line(index, message, model, tmp_path):
    directory = broken(model, tmp_path / "model", "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json {message}"):
        stored_files(directory)


def test_weights_that_are_a_pointer(model, tmp_path):
    directory = broken(model, tmp_path / "model", "model.safetensors", LFS)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        hf.load(directory, hf.read_config(directory))


# ------------------------------------------------------------------------------------------------- models of the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_offline_one_line_says_how_to_fetch_a_model(cache):
    message = (
        r"^no directory Qwen/Qwen2\.5-0\.5B-Instruct, and it cannot be had from the hub \(.*hf download Qwen/Qwen2\.5"
    )
    with pytest.raises(FileNotFoundError, match=message) as caught:
        hub.find_model("Qwen/Qwen2.5-0.5B-Instruct")
    assert "\n" not in str(caught.value)


def put_into(cache, model):
    """The snapshot of owner/small in the cache."""
    revision = "7ae557604adf67be50417f59c2c2f167def9a775"
    snapshot = cache / "models--owner--small" / "snapshots" / revision
    shutil.copytree(model, snapshot)
    (cache / "models--owner--small" / "refs").mkdir()
    (cache / "models--owner--small" / "refs" / "main").write_text(revision)
    return snapshot


def test_a_model_in_the_cache_is_taken_and_its_revision_is_in_its_name(cache, model):
    snapshot = put_into(cache, model)
    revision = snapshot.name
    for name in ("owner/small", f"owner/small@{revision}"):
        assert hub.find_model(name) == str(snapshot)
    cfg = hub.with_local_models(generate.Config(model="owner/small", prompt="Once"))
    assert cfg.model == str(snapshot)
    assert hub.model_name(cfg.model) == "small-7ae55760"
    assert hub.find_model(str(model)) == str(model)
    assert hub.find_model("/absent/model") == "/absent/model"  # no name of the hub: whoever reads it says so
    (snapshot / "model.safetensors").unlink()  # a download that was stopped
    with pytest.raises(FileNotFoundError, match="hf download owner/small --revision"):
        hub.find_model(f"owner/small@{revision}")


def test_a_run_keeps_the_revision_of_its_model_wherever_the_cache_is():
    directory = "models--owner--small-2.0/snapshots/7ae55760"
    for cache in ("/root/hub", "/shared/hub", "hub"):
        cfg = generate.Config(model=f"{cache}/{directory}", prompt="Once")
        assert hub.settings_of(cfg) == dataclasses.asdict(cfg) | {"model": "owner/small-2.0@7ae55760"}
    for model in ("/models/small", "owner/small", f"/root/hub/{directory}/folder"):
        assert hub.settings_of(generate.Config(model=model, prompt="Once"))["model"] == model


def test_what_a_script_reads_is_found_in_its_settings(cache, model, tmp_path, monkeypatch):
    """Models, reward models, rows, templates and rubrics; the hub's by their revision, in config.json."""
    snapshot = put_into(cache, model)
    monkeypatch.chdir(tmp_path)
    for name in ("reward", "critic", "number"):
        (tmp_path / name).mkdir()
    for name in ("a.jsonl", "b=2.jsonl", "t.txt", "rubric.txt"):
        (tmp_path / name).write_text("")
    reward = settings.Reward(rubric="rubric.txt")
    rewards = ("number", "process:reward=2", "owner/small=0.5@number", "judge:http://h/v1")
    files = dict(model=str(snapshot), prompts=("a.jsonl=2", "b=2.jsonl=1"), critic_model="critic", template="@t.txt")
    cfg = ppo.Config(**files, rewards=rewards, reward=reward)
    assert inputs_of(cfg) == sorted(["a.jsonl", "b=2.jsonl", "critic", "reward", "rubric.txt", "t.txt"])
    pinned = f"owner/small@{snapshot.name}=0.5@number"
    assert hub.settings_of(cfg)["rewards"] == ["number", "process:reward=2", pinned, "judge:http://h/v1"]
    again = dataclasses.replace(cfg, rewards=tuple(hub.settings_of(cfg)["rewards"]))
    assert hub.settings_of(again)["rewards"] == hub.settings_of(cfg)["rewards"]
    learned = dpo.Config(model="reward", data=settings.Data(files=("a.jsonl", "hf://owner/rows"), completion="@t.txt"))
    assert inputs_of(learned) == ["a.jsonl", "reward", "t.txt"]
    assert inputs_of(score.Config(data="a.jsonl")) == ["a.jsonl"]


def test_a_run_keeps_the_revision_of_its_rows(cache):
    """That of the newest snapshot, and none where there is none and no network; a revision that is named stays."""
    snapshots = cache / "datasets--owner--rows" / "snapshots"
    for time, name in enumerate(("b" * 40, "a" * 40)):
        (snapshots / name).mkdir(parents=True)
        os.utime(snapshots / name, (time, time))
    named = ("hf://owner/rows/main:test=2", "hf://owner/rows@v1=1", "hf://other/rows", "rows.jsonl")
    pinned = (f"hf://owner/rows@{'a' * 40}/main:test=2", *named[1:])
    assert hub.settings_of(ppo.Config(model="m", prompts=named))["prompts"] == pinned
    assert hub.settings_of(dpo.Config(model="m", data=settings.Data(files=named)))["data"]["files"] == pinned
    assert hub.settings_of(score.Config(data="hf://owner/rows"))["data"] == f"hf://owner/rows@{'a' * 40}"


def test_runs_are_called_after_the_run_that_made_their_model():
    names = [hub.model_name(f"runs/sft/{run}/{kind}") for run in "ab" for kind in ("model", "best")]
    assert names == ["a", "a-best", "b", "b-best"]
    assert hub.model_name("/models/small") == "small"
    long = [hub.model_name(f"runs/sft/{'x' * 100}{run}/model") for run in "ab"]
    assert len(set(long)) == 2
    assert {len(name) for name in long} == {hub.LONGEST}
    made = offline.make_run(dpo.Config(model="/runs/sft/a/model", data=settings.Data(files=("b.jsonl",))), "dpo.py", ())
    assert made.directory == Path("runs/dpo/a-b-seed0")


def test_all_processes_take_the_revision_that_process_0_has(cache, model, monkeypatch):
    """In this host's cache the branch is already another commit."""
    (cache / "models--owner--small" / "refs").mkdir(parents=True)
    (cache / "models--owner--small" / "refs" / "main").write_text("b" * 40)
    snapshots = {letter: cache / "models--owner--small" / "snapshots" / (letter * 40) for letter in "ab"}
    for snapshot in snapshots.values():
        shutil.copytree(model, snapshot)
    assert hub.find_model("owner/small") == str(snapshots["b"])
    monkeypatch.setattr(distributed, "is_main", lambda: False)

    def find_where_process_0_has(directory):
        monkeypatch.setattr(distributed, "on_main", lambda name, call: directory)
        return hub.find_model("owner/small")

    for letter in "ab":
        found = find_where_process_0_has(f"/elsewhere/models--owner--small/snapshots/{letter * 40}")
        assert found == str(snapshots[letter])
    with pytest.raises(FileNotFoundError, match=f"hf download owner/small --revision {'c' * 40}"):
        find_where_process_0_has(f"/elsewhere/models--owner--small/snapshots/{'c' * 40}")
    assert find_where_process_0_has("owner/small") == "owner/small"  # a directory of that name


def test_rows_are_read_with_their_place(tokenizer, tmp_path):
    table = read_table(write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"}))
    found = read_rows(table, lambda row: row, data.read_prompt, tokenizer)
    assert [one.place for one in found] == [table.place(0), table.place(1)]
    assert [one.row for one in found] == table.rows
