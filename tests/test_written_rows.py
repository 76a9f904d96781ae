"""What was sampled from is what files are written of, what judges read, and what the file's completions answer."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import best_of_n, collect, rlhf
from experiments.common import data, reward_models, sampling
from experiments.common.feedback import Candidates, line_of
from experiments.common.records import judged_prompts
from experiments.common.rows import make_shape
from experiments.common.settings import Rows, Sampling
from experiments.tools import generate
from rewards import servers
from rljax.data.demonstrations import demonstrations
from rljax.data.examples import comparison, demonstration, prompt_ids, prompt_of
from rljax.data.tokenizer import load_tokenizer
from rljax.rewards import judge
from rljax.rollouts.partial import carry_from_arrays, resume_rows

TEMPLATE = (
    "{% if tools %}<s>tools: {{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ASKED = [{"role": "user", "content": "What is 2+2?"}]
GOLD = {"role": "assistant", "content": "It is 4."}
TALK = [{"role": "system", "content": "Be brief."}, *ASKED, GOLD, {"role": "user", "content": "And 3+3?"}]
OTHERS = {"answer": "4", "label": 1, "margin": 2, "votes": 7, "ended": [False, False]}
PLAIN = {"template": "{prompt}"}
CHAT = {"template": "{prompt}", "chat": True, "system": "Be kind."}
FILES = {  # a row, how it is read, and the text of the prompt that the model reads
    "plain": ({"prompt": "What is 2+2?"}, PLAIN, "What is 2+2?"),
    "a template": ({"question": "2+2"}, {"template": "What is {question}?"}, "What is 2+2?"),
    "messages": ({"messages": [*ASKED, GOLD]}, PLAIN, "<s>user: What is 2+2?</s><s>assistant: "),
    "a talk": (
        {"prompt": TALK},
        PLAIN,
        "<s>system: Be brief.</s><s>user: What is 2+2?</s><s>assistant: It is 4.</s>"
        "<s>user: And 3+3?</s><s>assistant: ",
    ),
    "text as a chat": (
        {"prompt": "What is 2+2?"},
        CHAT,
        "<s>system: Be kind.</s><s>user: What is 2+2?</s><s>assistant: ",
    ),
    "tools": (
        {"messages": ASKED, "tools": TOOLS},
        PLAIN,
        '<s>tools: [{"type": "function", "function": {"name": "add", "parameters": {}}}]</s>'
        "<s>user: What is 2+2?</s><s>assistant: ",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(shared, tmp_path_factory):
    """stories260k's, with a chat template that knows tools."""
    directory = tmp_path_factory.mktemp("written") / "model"
    shutil.copytree(shared / "models" / "stories260k", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(directory)


def read(tmp_path, tokenizer, row, template, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row | OTHERS) + "\n")
    shape = make_shape(template, "", Rows(**options))
    return data.read_all_prompts(data.read_files(str(file)), shape, tokenizer, 500, 0)


@pytest.mark.parametrize(("row", "how", "text"), FILES.values(), ids=FILES)
def test_what_is_written_begins_as_what_was_sampled(row, how, text, tokenizer, tmp_path):
    prompts = read(tmp_path, tokenizer, row, **how)
    is_chat = text.startswith("<s>")
    assert prompts.encoded == [(tokenizer.encode_more if is_chat else tokenizer.encode)(text)]
    batch = prompts.first(1)
    traj = demonstrations(batch, [tokenizer.encode_more(" four")], 8)
    ended = np.asarray(traj.mask) & False
    traj = traj.replace(rewards=jnp.zeros(traj.mask.shape), terminated=ended)
    (record,) = json.loads(json.dumps(judged_prompts(traj, batch, tokenizer.decode)))
    chosen = best_of_n.choose(record, None, keep_cut=True)
    pair = line_of(Candidates(0, batch.as_read[0], ["four", "five"], np.array([1, 1]), [True, True], None), 0, 1)
    for written, found in [
        (chosen, demonstration(chosen, tokenizer)),
        (pair, comparison(pair, tokenizer).chosen),
    ]:
        assert found.prompt == prompts.encoded[0]
        assert tokenizer.decode(found.completion).strip() == "four"
        assert written["answer"] == "4"
        assert not {"messages", "label", "margin"} & written.keys()
        assert ("votes" in written) == (written is chosen)
        assert written.get("ended", [True, True]) == [True, True]
        assert prompt_ids({"prompt": written["prompt"], "tools": written.get("tools")}, tokenizer) == found.prompt


@pytest.mark.parametrize(("row", "how", "text"), FILES.values(), ids=FILES)
def test_judges_and_reward_models_read_what_the_policy_read(row, how, text, tokenizer, tmp_path):
    """A conversation in the reward model's own template, which is the policy's here."""
    batch = read(tmp_path, tokenizer, row, **how).draw(0, 1)
    prompt = batch.tokens[0][batch.mask[0]].tolist()
    traj = demonstrations(batch, [[*tokenizer.encode_more("four"), tokenizer.eos]], 8)
    ends = np.asarray(traj.mask) & (np.asarray(traj.actions) == tokenizer.eos)
    traj = traj.replace(terminated=ends, group=batch.number)
    again = reward_models.encode_again(traj, batch, tokenizer, tokenizer)
    ids = np.asarray(again.inputs)[np.asarray(again.segments) > 0].tolist()
    assert tokenizer.decode(ids[: len(prompt)]) == tokenizer.decode(prompt)
    with servers.serve(servers.chat(lambda question: "Score: 1")) as server:
        endpoint = judge.Endpoint(server.url + "/v1", "m")
        judge.make_judge(endpoint, tokenizer.decode, rubric="{prompt}|{completion}|{answer}")(traj, batch)
    (question,) = (body["messages"][0]["content"] for body in server.requests)
    messages = prompt_of(batch.as_read[0]) if text.startswith("<s>") else []
    shown = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages) or "What is 2+2?"
    assert [part.strip() for part in question.split("|")] == [shown, "four", "4"]
    assert batch.columns[0] == row | OTHERS  # verifiers read the file's columns


def test_prompts_that_are_resumed_keep_their_rows(tokenizer, tmp_path):
    prompts = read(tmp_path, tokenizer, *FILES["text as a chat"][:1], **CHAT)
    batch = prompts.draw(0, 1)
    traj = demonstrations(batch, [tokenizer.encode_more(" four")], 8)
    no = np.zeros(traj.mask.shape, bool)
    left = resume_rows(batch, traj.replace(terminated=no, truncated=no), 1, 0)
    assert left.as_read == batch.as_read
    from_state = {"number": batch.number, "answer": np.zeros(1), "began": np.zeros(1)}
    from_state |= {"tokens": left.tokens, "mask": left.mask, **left.resume.facts}
    carried = carry_from_arrays(from_state, prompts.columns_of, prompts.shaped_of)
    assert (carried.as_read, carried.columns) == (batch.as_read, batch.columns)
    assert carried.as_read != carried.columns


def answered(tmp_path, tokenizer, row, template, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    files = data.read_files(str(file))
    return data.read_prompts(files, template, tokenizer, 500, 1, 0, Rows(**options), data.read_answered_prompt)[0]


@pytest.mark.parametrize(
    ("row", "how", "completion"),
    [
        ({"prompt": "What is 2+2?", "completion": " four"}, PLAIN, "four"),
        ({"question": "2+2", "completion": " four"}, {"template": "What is {question}?"}, "four"),
        ({"prompt": "What is 2+2?", "completion": "four"}, CHAT, "four"),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "four"}]}, PLAIN, "four"),
    ],
)
def test_the_files_completions_answer_the_prompts_that_are_sampled_from(row, how, completion, tokenizer, tmp_path):
    """And end as sampled ones do: of a chat with the template's end of turn."""
    prompts = answered(tmp_path, tokenizer, row, **how)
    shaped = make_shape(how["template"], "", Rows(**{k: v for k, v in how.items() if k != "template"}))(row)
    want = demonstration(shaped, tokenizer)
    assert prompts.encoded == [want.prompt]
    mix = sampling.make_mix(0.0, Sampling(max_tokens=20), prompts, 0)
    batch = prompts.draw(0, 1)
    traj = mix(0, demonstrations(batch, [[1]], 20).replace(group=jnp.asarray(batch.number)), batch)
    found = np.asarray(traj.actions)[np.asarray(traj.mask)].tolist()
    assert found == want.completion
    assert found[-1] in tokenizer.stop
    assert tokenizer.decode(found).strip() == completion


def test_a_row_without_a_completion_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: no column 'completion'; legal: with one, or --on_pol"):
        answered(tmp_path, tokenizer, {"prompt": "a"}, **PLAIN)


@pytest.mark.parametrize("script", [best_of_n, collect])
def test_a_prompt_that_was_cut_is_not_written_whole(script):
    out = {"out": "/absent"} if script is collect else {}
    for overlong in ("cut_left", "cut_right"):
        cfg = script.Config(model="/absent", prompts="/absent", data=Rows(overlong=overlong), **out)
        with pytest.raises(ValueError, match=f"data.overlong = {overlong}: .*legal: drop, or error"):
            script.main(cfg)


def test_weights_are_refused_where_every_prompt_is_taken_once(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n')
    files = data.read_files([f"{file}=2"])
    with pytest.raises(ValueError, match=r"rows\.jsonl=2: every prompt is taken once; legal: FILE without a weight"):
        data.read_all_prompts(files, lambda row: row, tokenizer, 500, 0)


def test_generate_shows_the_question_not_the_answer(tokenizer, tmp_path):
    assert generate.text_of_prompt({"messages": [*ASKED, GOLD]}) == "What is 2+2?"


def test_the_road_wants_prompts_that_are_texts(tmp_path):
    file = tmp_path / "rows.jsonl"
    for row, found in ({"question": "a"}, "None"), ({"prompt": ASKED}, ".*user"):
        file.write_text('{"prompt": "a"}\n' + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2, column 'prompt': {found}.*; legal: a text"):
            rlhf.openings_to_train_on(rlhf.Config(model="/absent", prompts=str(file)))
