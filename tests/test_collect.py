"""collect.py: votes follow the equation, a person's words are read, the file goes on where it stopped."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import collect
from experiments.common.feedback import (
    Candidates,
    compare_by_person,
    end_last_line,
    own_lines,
    rankings_of,
    report_agreement,
    worth_of,
)
from experiments.common.panel import preference_probability, votes, worths
from experiments.common.settings import MeshShape, Panel, PromptData, Sampling
from experiments.reward_model import completions_of, read_row
from models import tiny
from rewards import hostile
from rljax.data.examples import comparison
from rljax.data.tokenizer import load_tokenizer
from test_grpo_experiment import RAW, ROWS, write_prompts, write_tokenizer

ROLES = ["user", "assistant", "assistant"]
VERIFIERS = {"length": hostile.length, "share": hostile.share_of}


# --------------------------------------------------------------------------------------------------------------- panel


def test_the_share_of_votes_is_the_probability_of_the_equation():
    """(1 - f) σ(d/T) + f (1 - σ(d/T)) in float64, over 4,000 annotators: within 4 standard errors."""
    panel = Panel(annotators=4000, flip=0.1, temperature=0.5, length_bias=2.0)
    scores, lengths = np.array([0.3, 0.1, 0.6]), np.array([10, 40, 20])
    found = votes(worths(scores, lengths, panel, 3, 5), panel, 3, 5)
    shares = [found[pair].mean() for pair in ((0, 1), (0, 2), (1, 2))]
    worth = scores + 2.0 * lengths / 100
    differences = np.array([worth[0] - worth[1], worth[0] - worth[2], worth[1] - worth[2]])
    p = 1 / (1 + np.exp(-differences / 0.5))
    np.testing.assert_allclose(shares, 0.9 * p + 0.1 * (1 - p), rtol=0, atol=4 * 0.5 / np.sqrt(4000))


def test_taste_makes_annotators_disagree_as_a_normal_distribution_says():
    """u_a0 - u_a1 = 1 + √2 · 1 · ε: preferred with probability Φ(1/√2) = 0.7602."""
    panel = Panel(annotators=4000, disagreement=1.0)
    found = votes(worths(np.array([1.0, 0.0]), np.array([1, 1]), panel, 0, 0), panel, 0, 0)
    share = found[0, 1].mean()
    assert share == pytest.approx(0.7602, abs=4 * 0.43 / np.sqrt(4000))


@given(st.floats(-50, 50), st.floats(0, 0.5), st.sampled_from([0.0, 0.1, 2.0]))
def test_a_pair_turned_round_turns_its_probability_round(difference, flip, temperature):
    panel = Panel(flip=flip, temperature=temperature)
    one = preference_probability(np.float64(difference), panel)
    other = preference_probability(np.float64(-difference), panel)
    np.testing.assert_allclose(one + other, 1.0, atol=1e-12)


def test_a_perfect_panel_prefers_the_higher_score_and_votes_depend_on_nothing_else():
    panel = Panel(annotators=2)
    worth = worths(np.array([1.0, 3.0, 2.0, 3.0]), np.ones(4), panel, 0, 7)
    found = {pair: for_first.tolist() for pair, for_first in votes(worth, panel, 0, 7).items()}
    no, yes = [False] * 2, [True] * 2
    assert found == {(0, 1): no, (0, 2): no, (0, 3): no, (1, 2): yes, (2, 3): no}  # 1 and 3 are worth the same
    noisy = Panel(annotators=9, flip=0.5)
    one, again, other = (votes(np.eye(9), noisy, 0, number)[0, 1].tolist() for number in (7, 7, 8))
    assert one == again != other


def test_agreement_is_of_votes_for_a_completion_not_for_the_winner(capsys):
    """Two annotators who agree on three pairs of four; for the first of a pair they vote 2 and 1 times."""
    first = [(True, True), (False, False), (False, False), (True, False)]
    lines = [{"votes": list(votes) if votes[0] else [not v for v in votes], "pair": [0, 1]} for votes in first]
    lines = [line | {"pair": [0, 1] if votes[0] else [1, 0]} for line, votes in zip(lines, first, strict=True)]
    report_agreement(lines)
    # p_o = 3/4, p_e = 1/2 · 1/4 + 1/2 · 3/4 = 1/2
    assert capsys.readouterr().out == "2 annotators agree on 75.0% of 4 pairs; Cohen's kappa 0.500\n"


# -------------------------------------------------------------------------------------------------------------- person


@pytest.mark.parametrize(
    ("answer", "kind", "worth"),
    [
        ("2 3 1", "ranking", [-2, 0, -1]),
        ("1 2", "ranking", None),
        ("1 2 2", "ranking", None),
        ("a b c", "ranking", None),
        ("7 3.5 -1", "scores", [7, 3.5, -1]),
        ("7 3", "scores", None),
        ("7 nan 1", "scores", None),
    ],
)
def test_what_a_person_types(answer, kind, worth):
    assert worth_of(answer.split(), 3, kind) == worth


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    root = tmp_path_factory.mktemp("collect")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    return collect.Config(
        model=str(root / "model"),
        prompts=write_prompts(root / "prompts.jsonl", ROWS),
        out=str(root / "preferences.jsonl"),
        n=3,
        rewards=("length", "share=0.01"),
        panel=Panel(annotators=2, flip=0.2),
        sampling=Sampling(max_tokens=6),
        rows=6,
        mesh=MeshShape(fsdp=1, tensor=-1),
    )


def test_a_panel_fills_a_file_that_goes_on_where_it_stopped(cfg, capsys):
    lines = collect.main(cfg, VERIFIERS)
    assert len(ROWS) < len(lines) <= len(ROWS) * 3
    out = capsys.readouterr().out
    assert re.search(r"2 annotators agree on \d+\.\d% of \d+ pairs; Cohen's kappa -?\d\.\d{3}\n", out)
    cut = sum(not all(line["ended"]) for line in lines)
    assert f"{cut} of {len(lines)} hold a completion that was cut at max_tokens: it is marked, and has no end\n" in out
    tokenizer = load_tokenizer(cfg.model)
    pair = comparison(lines[0], tokenizer)
    assert [one.completion[-1] in tokenizer.stop for one in (pair.chosen, pair.rejected)] == lines[0]["ended"]
    for line in lines:
        assert line["prompt"] in {row["prompt"] for row in ROWS}
        for_chosen = sum(line["votes"])
        assert for_chosen >= 1
        assert line["margin"] == (2 * for_chosen - 2) / 2
    file = Path(cfg.out)
    whole = file.read_bytes()
    for stop in (0, len(whole) // 2, len(whole) - 1, len(whole)):
        file.write_bytes(whole[:stop])
        collect.main(cfg, VERIFIERS)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "chosen": "b"}\n{"prompt": "precious", "chosen": "c"}',
        '{"prompt": "precious"}\n',
        '{"prompt": "precious"',
        "precious\n[1]\n",
    ],
)
def test_a_file_of_others_is_refused_and_left_as_it_was(text, cfg, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    with pytest.raises(ValueError, match=r"other\.jsonl holds other preferences; legal: a new file"):
        collect.main(dataclasses.replace(cfg, out=str(other)), VERIFIERS)
    assert other.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_what_is_whole_of_a_file_stays(tmp_path):
    """A last line without a new line is whole where it is JSON; half a line goes, with the prompt before it."""
    file = tmp_path / "mine.jsonl"
    lines = [{"row": row, "pair": pair} for row, pair in ((0, [0, 1]), (1, [0, 1]), (1, [0, 2]))]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    cut = {whole: 3, whole[:-1]: 3, whole[:-3]: 1, whole + "{": 1, whole + '{"é': 1, whole + "\n \n": 3, "": 0}
    for text, left in cut.items():
        content = text.encode()[: len(text)]  # é without its second byte
        file.write_bytes(content)
        assert own_lines(str(file)) == lines[:left]
        assert file.read_bytes() == content
    file.write_text(whole[:-1])
    end_last_line(str(file), lines)
    assert file.read_text() == whole


def test_other_prompts_or_votes_are_not_mixed_into_a_file(cfg, tmp_path):
    collect.main(cfg, VERIFIERS)
    for change in ({"seed": 5}, {"panel": Panel(annotators=3)}, {"rewards": ()}):
        with pytest.raises(ValueError, match="holds preferences of other settings: "):
            collect.main(dataclasses.replace(cfg, **change), VERIFIERS)


def test_a_file_of_other_rows_is_not_gone_on_with(cfg, tmp_path):
    mine = dataclasses.replace(cfg, prompts=write_prompts(tmp_path / "p.jsonl", ROWS), out=str(tmp_path / "out.jsonl"))
    one = dataclasses.replace(mine, count=1)
    assert collect.main(one, VERIFIERS)
    write_prompts(tmp_path / "p.jsonl", ROWS[::-1])
    with pytest.raises(ValueError, match=r"p\.jsonl has changed since .*out\.jsonl\.config\.json was begun: .* --out"):
        collect.main(one, VERIFIERS)
    kept = Path(f"{mine.out}.config.json")
    kept.write_text(json.dumps(json.loads(kept.read_text())["config"]))  # as an earlier version left it
    write_prompts(tmp_path / "p.jsonl", ROWS)
    collect.main(one, VERIFIERS)


def test_the_pairs_of_a_prompt_are_a_ranking():
    """The order of wins: 2, 0, 1; of a prompt whose two best won equally often the first stays."""

    def line(row, better, worse):
        texts = {"chosen": f"c{better}", "rejected": f"c{worse}", "ended": [better > 0, worse > 0]}
        return {"prompt": f"p{row}", "tools": [], "row": row, "pair": [better, worse], "votes": [True], **texts}

    lines = [line(0, 0, 1), line(0, 2, 0), line(0, 2, 1), line(3, 0, 2), line(3, 1, 2), line(4, 1, 0)]
    cycle = [line(5, 0, 1), line(5, 1, 2), line(5, 2, 0)]
    assert rankings_of(lines + cycle) == [
        {"prompt": "p0", "tools": [], "row": 0, "completions": ["c2", "c0", "c1"], "ended": [True, False, True]},
        {"prompt": "p3", "tools": [], "row": 3, "completions": ["c0", "c2"], "ended": [False, True]},
        {"prompt": "p4", "tools": [], "row": 4, "completions": ["c1", "c0"], "ended": [True, False]},
    ]


def test_a_person_is_asked_again_leaves_out_and_stops(cfg, tmp_path, capsys):
    answers = iter(["3 1 2", "no", "", "1 3 2", "q"])
    asked = []

    def ask(text):
        asked.append(text)
        return next(answers)

    mine = dataclasses.replace(cfg, rewards=(), out=str(tmp_path / "mine.jsonl"), count=5)
    ranked = tmp_path / "ranked.jsonl"
    lines = collect.main(dataclasses.replace(mine, rankings=str(ranked)), VERIFIERS, ask)
    rows = [json.loads(text) for text in ranked.read_text().splitlines()]
    best, _, worst = rows[0]["completions"]  # of the answer "3 1 2"
    assert (best, worst) == (lines[2]["chosen"], lines[2]["rejected"])
    assert len(completions_of(read_row(rows[1], load_tokenizer(cfg.model)))) == 3
    assert len(asked) == 5
    assert [line["row"] for line in lines] == [0, 0, 0, 2, 2, 2]
    assert [line["pair"] for line in lines[:3]] == [[0, 1], [2, 0], [2, 1]]
    assert "margin" not in lines[0]
    assert own_lines(mine.out) == lines

    def stop(text):
        raise EOFError

    scored = dataclasses.replace(mine, ask="scores")
    assert collect.main(scored, VERIFIERS, stop) == lines
    none = dataclasses.replace(scored, out=str(tmp_path / "none.jsonl"))
    assert collect.main(none, VERIFIERS, stop) == []
    assert f"no comparison was made: {none.out} is not written\n" in capsys.readouterr().out
    assert not Path(none.out).exists()
    answers = iter(["1 1 3", "2 1 0"])
    lines = collect.main(scored, VERIFIERS, lambda text: next(answers))
    assert [line["margin"] for line in lines[6:]] == [2, 2, 1, 2, 1]


@pytest.mark.parametrize("as_messages", [False, True])
def test_what_a_person_is_shown_controls_no_terminal(as_messages, capsys):
    text = "\x1b[2J\u202e"
    prompt = [{"role": "user", "content": text}] if as_messages else text
    candidates = Candidates(0, {"prompt": prompt}, [text, "b"], np.array([2, 1]), [True, True], None)
    assert len(compare_by_person(candidates, "ranking", lambda _: "1 2")) == 1
    out = capsys.readouterr().out
    assert out.count("\ufffd[2J\ufffd") == 2
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_a_chat_is_written_as_messages(cfg, tmp_path):
    """And read back: the prompt in the template, the completion as the assistant's turn."""
    shutil.copytree(cfg.model, tmp_path / "model")
    template = "{% for m in messages %}{{ m.role[0] }}-{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}a-{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    fields = {"model": str(tmp_path / "model"), "out": str(tmp_path / "chat.jsonl"), "data": PromptData(chat=True)}
    lines = collect.main(dataclasses.replace(cfg, count=2, **fields), VERIFIERS)
    tokenizer = load_tokenizer(tmp_path / "model")
    for line in lines:
        assert [message["role"] for message in (*line["prompt"], *line["chosen"], *line["rejected"])] == ROLES
        found = comparison(line, tokenizer)
        assert tokenizer.decode(found.chosen.prompt) == f"u-{line['prompt'][0]['content']}a-"
        assert tokenizer.decode(found.rejected.completion) == line["rejected"][0]["content"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 1}, "n = 1; at least 2 completions"),
        ({"panel": Panel(flip=0.6)}, r"flip = 0\.6; from 0 to 0\.5"),
        ({"panel": Panel(annotators=0, temperature=-1)}, "annotators = 0; at least 1; temperature = -1"),
        ({"rewards": ("beauty",)}, "reward 'beauty'; legal"),
        ({"data": PromptData(chat=True)}, "chat template"),
    ],
)
def test_what_is_refused(fields, message, cfg, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect.main(dataclasses.replace(cfg, out=str(tmp_path / "out.jsonl"), **fields), VERIFIERS)
    assert not (tmp_path / "out.jsonl").exists()
