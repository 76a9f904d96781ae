"""tools/generate.py: the completions of `sample`, as text, on a screen and in a file; what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.common.sampling import make_sampling
from experiments.common.settings import Sampling
from experiments.tools import generate
from models import tiny
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import character_tokenizer, load_tokenizer
from rljax.models import decoder, hf
from rljax.rollouts.sample_token import check_logp
from rljax.rollouts.sampler import sample
from rljax.types import PromptBatch
from test_experiments import ENVIRONMENT, SCRIPTS, flags
from test_grpo_experiment import RAW, write_prompts, write_tokenizer

WORDS = [{"prompt": prompt} for prompt in ("once upon a time, there", "a", "what is it?")]
LONG = {"prompt": "a" * 60}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> generate.Config:
    root = tmp_path_factory.mktemp("generate")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    prompts, sampling = write_prompts(root / "prompts.jsonl", [*WORDS, LONG]), Sampling(max_tokens=20)
    return generate.Config(str(root / "model"), prompts=prompts, n=2, seed=4, sampling=sampling, rows=4)


def change(cfg, **fields):
    return dataclasses.replace(cfg, **fields)


def sampled(cfg: generate.Config, prompts: list[str]):
    """Tokens, log-prob and how it ended of each completion, all sampled at once by `sample`."""
    config, tokenizer = hf.read_config(cfg.model), load_tokenizer(cfg.model)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens, mask = pad_left(ids, max(map(len, ids)), 0)
    rows = PromptBatch(tokens, mask, np.arange(len(ids), dtype=np.int32), [{} for _ in ids], 0)
    sampling = make_sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)
    params = {"decoder": hf.load(cfg.model, config)}
    traj = sample(decoder.language_model(config), params, {}, rows, sampling, cfg.seed, 0)
    for row in range(len(ids) * cfg.n):
        drawn = np.asarray(traj.mask)[row]
        yield traj.actions[row][drawn].tolist(), float(traj.logp[row][drawn].sum()), bool(traj.terminated[row].any())


def test_the_completions_are_those_of_sample(asked, tmp_path, capsys):
    lines = generate.main(cfg := change(asked, out=str(tmp_path / "out.jsonl")))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == lines
    assert [line["columns"] for line in lines] == [WORDS[1], WORDS[2], WORDS[0]]  # the shortest first
    printed, decode = capsys.readouterr().out, load_tokenizer(asked.model).decode
    assert "1 of 4 prompts dropped, longer than 44 tokens\n" in printed
    want = list(sampled(cfg, [row["prompt"] for row in WORDS]))
    assert {stopped for _, _, stopped in want} == {False, True}
    for place, line in zip((1, 2, 0), lines, strict=True):
        assert f"[{place + 1}/3] {line['prompt']}\n" in printed
        for g, (tokens, logp, stopped) in enumerate(want[2 * place : 2 * place + 2]):
            assert line["completion"][g] == decode(tokens)
            assert line["tokens"][g] == len(tokens)
            assert line["logp"][g] == pytest.approx(logp, abs=1e-3)
            assert line["ended"][g] == ("stop" if stopped else "length")
            facts = f"({len(tokens)} tokens, {line['ended'][g]}, log-prob {line['logp'][g]:.1f})"
            assert f"{g + 1}/2 {line['completion'][g]}\n{facts}\n" in printed


def test_a_terminal_reads_along(asked, monkeypatch, capsys):
    generate.main(asked)
    *piped, _ = capsys.readouterr().out.splitlines()
    printed, log_info = [], generate.log_info
    monkeypatch.setattr(generate, "is_interactive", lambda: True)
    monkeypatch.setattr(
        generate, "log_info", lambda *args, **kwargs: (printed.append(args[0]), log_info(*args, **kwargs))
    )
    generate.main(asked)
    *read, _ = capsys.readouterr().out.splitlines()
    assert read == piped
    assert len(printed) > 3 * len(piped)  # the first of a batch token by token


def test_control_characters_are_not_printed(capsys):
    answers = generate.Completions(*(np.array([x]) for x in ([7], [-1.0], 1, True, True)))
    generate.show([answers], [""], ["is"], 1, lambda *_: "\x1b[2J\ta\nb\x9b", [])
    assert capsys.readouterr().out.startswith("is�[2J")


def test_the_script(asked, tmp_path):
    """As a newcomer runs it, with stop strings and a chat template."""
    (tmp_path / "model").mkdir()
    for file in Path(asked.model).iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    template = "you: {{ messages[0].content }}{% if add_generation_prompt %} me:{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    given = {"model": tmp_path / "model", "prompt": "who?", "out": tmp_path / "out.jsonl", "sampling.max_tokens": 20}
    words = [*flags(given), "--chat", "--sampling.stop_strings", *"aeiou"]
    script = [sys.executable, "-W", "error", SCRIPTS / "tools" / "generate.py", *words]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads((tmp_path / "out.jsonl").read_text())
    (answer,), (tokens,) = line["completion"], line["tokens"]
    assert line["ended"] == ["stop"]
    assert not set(answer) & set("aeiou")
    assert len(answer) < tokens < 20
    assert done.stdout.startswith(f"who?\n{answer}\n({tokens} tokens, stop, ")
    assert done.stderr == ""


@pytest.fixture
def with_template(asked, tmp_path) -> str:
    """The model with a chat template in which the assistant's turns end with </s>."""
    (tmp_path / "model").mkdir()
    for file in Path(asked.model).iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    turn = "{{ m.role[0] }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %} "
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}a: {{% endif %}}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    return str(tmp_path / "model")


def test_a_conversation_in_turns_goes_on_from_the_tokens_that_were_sampled(
    with_template, tmp_path, monkeypatch, capsys
):
    drawn, stream = [], generate.stream

    def watched(lm, params, frozen, rows, *rest, **settings):
        for answers in stream(lm, params, frozen, rows, *rest, **settings):
            yield answers
        drawn.append((rows.tokens[0][rows.mask[0]].tolist(), answers.tokens[0, : answers.num_tokens[0]].tolist()))

    monkeypatch.setattr(generate, "stream", watched)
    cfg = generate.Config(with_template, chat=True, sampling=Sampling(max_tokens=6), out=str(tmp_path / "out.jsonl"))
    lines = ["hi", "who?", "why", "what"]
    ((record,), tokenizer) = generate.talk(cfg, lines), load_tokenizer(with_template)
    roles = [message["role"] for message in record["messages"]]
    answered = roles.count("assistant")
    assert roles == ["user", "assistant"] * answered
    assert [message["content"] for message in record["messages"][::2]] == lines[:answered]
    assert drawn[0][0] == tokenizer.encode_more("u: hi a: ")
    for (before, sampled), (after, _), line in zip(drawn, drawn[1:], lines[1:], strict=False):
        end = [] if sampled[-1] in tokenizer.stop else list(tokenizer.stop)
        assert after == [*before, *sampled, *end, *tokenizer.encode_more(f" u: {line} a: ")]
    assert answered == len(drawn) >= 2
    assert json.loads((tmp_path / "out.jsonl").read_text()) == record
    printed = capsys.readouterr().out
    assert printed.count("log-prob") == answered
    assert answered == 4 or "of 64 too few are left for an answer" in printed


def test_a_conversation_that_is_interrupted_is_kept(with_template, tmp_path):
    def lines():
        raise KeyboardInterrupt
        yield

    out = tmp_path / "said.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate.talk(generate.Config(str(with_template), chat=True, out=str(out)), lines())
    assert json.loads(out.read_text()) == {"messages": []}


def test_the_lines_of_a_pipe_are_a_conversation(with_template):
    given = {"model": with_template, "sampling.max_tokens": 4}
    script = [sys.executable, "-W", "error", SCRIPTS / "tools" / "generate.py", *flags(given), "--chat"]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, input="hi\n\nwho?\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("log-prob") == 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": ""}, "legal: --prompt TEXT or --prompts FILE.jsonl, one of them"),
        ({"prompt": "a"}, "legal: --prompt TEXT or --prompts FILE.jsonl, one of them"),
        ({"chat": True}, "has no chat template; legal: without --chat"),
        ({"out": __file__}, "exists; legal: a new file"),
        ({"prompts": "", "chat": True, "n": 1}, "has no chat template; legal: without --chat"),
        ({"prompts": "", "chat": True, "n": 3}, "goes on from one completion; legal: --n 1, or a --prompt"),
        ({"n": 0}, "must be at least 1, not 0"),
        ({"sampling": Sampling(max_tokens=64)}, "legal: a sum of at most 64"),
        ({"sampling": Sampling(top_p=2.0, max_tokens=8)}, "top_p is 2.0; legal"),
        (
            {"sampling": Sampling(stop_strings=("",), max_tokens=8)},
            "legal: a list of one or more, each of at least one",
        ),
        (
            {"sampling": Sampling(max_concurrent=2, max_tokens=8)},
            "max_concurrent = 2, .*legal in a stream: max_concurrent=None",
        ),
    ],
)
def test_what_it_refuses(asked, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate.main(change(asked, **wrong))


def test_settings_of_the_command_line_become_those_of_the_sampler():
    given = Sampling(0.5, 3, 0.9, 0.1, 1.2, 2, ("\\nb", "ab"), 7, 5)
    got = make_sampling(given, 4, character_tokenizer("ab\n"), vocabulary=6)
    automaton = got.stop_strings
    assert automaton.shape == (3, 6)
    assert (np.asarray(automaton)[:, 4:] == np.arange(3)[:, None]).all()  # ids that the tokenizer lacks say nothing
    assert [int(automaton[automaton[0, 3], 2]), int(automaton[automaton[0, 1], 2])] == [-1, -1]
    named = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2}
    named |= {"n": 4, "max_tokens": 7, "max_concurrent": 5, "stop": (0,)}
    assert {name: getattr(got, name) for name in named} == named
    check_logp(got)  # what is not trained on is sampled whatever is cut off
    assert make_sampling(Sampling(), 1, character_tokenizer("a"), 2).stop_strings is None


def test_stories260k(shared):
    """Greedy: the text that `sample` draws, up to a stop string that spans tokens."""
    model = str(shared / "models" / "stories260k")
    cfg = generate.Config(model, "Once upon a time", sampling=Sampling(0.0, max_tokens=40))
    ((tokens, *_),) = sampled(cfg, ["Once upon a time"])
    text = b"".join(load_tokenizer(model).token_bytes()[token] for token in tokens).decode()
    sampling = Sampling(0.0, stop_strings=("to play o", "zebra"), max_tokens=40)
    (line,) = generate.main(change(cfg, sampling=sampling))
    before, stop, after = text.partition("to play o")
    assert (line["completion"], line["ended"]) == ([before], ["stop"])
    assert before.startswith(", there was a little girl named Lily.")
    assert stop
    assert after
    assert line["tokens"][0] < 40
