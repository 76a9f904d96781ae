"""score.py and evaluate.py: their counts against counts by hand, resuming, and bad input."""

import json
import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments import best_of_n, evaluate, score
from experiments.common.intervals import standard_error_interval, wilson_interval
from experiments.common.runs import digest_of
from experiments.common.settings import Adapter, MeshShape, Reward, Sampling, Weights
from experiments.evaluate import summarize
from models import tiny
from rewards import hostile
from rljax.rewards.score import RewardError
from rljax.rewards.text import exact_text
from test_grpo_experiment import RAW, VERIFIERS, change, write_prompts, write_tokenizer

SOLUTIONS = [
    {"question": "1 + 1", "solution": "it is 2", "answer": "#### 2", "is_correct": True},
    {"question": "1 + 2", "solution": "it is 4", "answer": "#### 3", "is_correct": False},
    {"question": "1 + 3", "solution": "it is 4", "answer": "#### 4", "is_correct": False},  # a wrong label
    {"question": "1 + 4", "solution": "it is 6", "answer": "#### 5", "is_correct": True},  # and another
    {"question": "1 + 5", "solution": "it is 6", "answer": "#### 6", "is_correct": True},
]
COMPARING = {"rewards": ("judge:http://h/v1",), "reward__compare": "ranking"}
GSM8K = Path(os.environ.get("RLJAX_SHARED", "../shared")) / "data" / "gsm8k_solutions_6b.jsonl"


def score_settings(root: Path, rows: list[dict], **fields) -> score.Config:
    cfg = score.Config(data=write_prompts(root / "solutions.jsonl", rows), directory=str(root / "run"), rows_at_once=2)
    return change(cfg, **fields)


def test_solutions_are_judged_and_compared_with_their_labels(tmp_path, capsys):
    cfg = score_settings(tmp_path, SOLUTIONS, rewards=("number", "length"))
    verifiers = VERIFIERS | {"length": hostile.length}
    counts = score.main(cfg, verifiers)
    assert counts["number"] == {
        "rows": 5,
        "failed": 0,
        "right": 3,
        "mean": 0.6,
        "both_right": 2,
        "only_the_verifier": 1,
        "only_the_label": 1,
        "both_wrong": 1,
    }
    last = capsys.readouterr().out.splitlines()
    said = (
        "number: 3 of 5 right (a score of at least 1), mean score 0.600, 0 not judged; agrees with is_correct on 3 of 5"
    )
    assert any(line.startswith(said) for line in last)
    written = (tmp_path / "run" / "scores.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert [record["scores"] for record in records] == [
        {"number": right, "length": 7.0} for right in (1.0, 0.0, 1.0, 0.0, 1.0)
    ]
    assert [{key: record[key] for key in SOLUTIONS[0]} for record in records] == SOLUTIONS

    half = written[: len(written) // 2].encode() + "é".encode()[:1]  # in the middle of a line, and of a character
    (tmp_path / "run" / "scores.jsonl").write_bytes(half)
    assert score.main(cfg, verifiers) == counts
    assert (tmp_path / "run" / "scores.jsonl").read_text() == written
    write_prompts(tmp_path / "solutions.jsonl", SOLUTIONS[:2])
    with pytest.raises(ValueError, match=r"solutions\.jsonl has changed since .* was begun: name another --directory"):
        score.main(cfg, verifiers)
    assert (tmp_path / "run" / "scores.jsonl").read_text() == written


def test_an_answer_of_another_column_is_read_and_not_written(tmp_path):
    rows = [{"completion": "4", "answer": "five", "truth": 4}]
    assert score.main(score_settings(tmp_path, rows, answer="truth"))["number"]["right"] == 1
    (record,) = (json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines())
    assert record == rows[0] | {"scores": {"number": 1.0}, "statuses": {"number": "ok"}}


def test_what_is_failed_is_counted(tmp_path):
    rows = [{"completion": "a x"}, {"completion": "bb"}]
    cfg = score_settings(tmp_path, rows, rewards=("sometimes",), reward=Reward(timeout_seconds=2.0))
    counts = score.main(cfg, {"sometimes": hostile.sometimes_endless})
    assert counts == {"sometimes": {"rows": 2, "failed": 1, "right": 1, "mean": 2.0}}


@pytest.mark.parametrize(
    ("rows", "fields", "kind", "message"),
    [
        (
            SOLUTIONS,
            {"rewards": ("numbers",)},
            ValueError,
            "reward 'numbers'; legal: animals, code, code_stdin, math, number",
        ),
        (
            SOLUTIONS,
            {"rewards": ("remote:http://h",)},
            ValueError,
            r"legal: animals, .*a server judges .*: evaluate\.py",
        ),
        ([{**SOLUTIONS[0], "scores": 1}], {}, ValueError, r"line 1, column 'scores': this script writes scores and st"),
        (SOLUTIONS, {"completion": "text"}, ValueError, r"line 1 has no column text; its columns are question, sol"),
        (SOLUTIONS, {"label": "right?"}, ValueError, r"line 1 has no column right\?"),
        ([{"question": "a"}], {}, ValueError, r"line 1 has no column completion or solution"),
        ([*SOLUTIONS, {"solution": None}], {}, ValueError, r"line 6, column 'solution': None; legal: a text"),
        ([{**SOLUTIONS[0], "is_correct": "yes"}], {}, ValueError, r"column 'is_correct': 'yes'; legal: true or false"),
        ([{**SOLUTIONS[0], "answer": "noon"}], {}, ValueError, r"line 1, column 'answer': number cannot judge 1 of 1"),
        ([{"completion": "1"}], {}, RewardError, r"^number asks for answer, which .* line 1 does not have"),
    ],
)
def test_bad_files_are_one_error(rows, fields, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        score.main(score_settings(tmp_path, rows, **fields))


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs $RLJAX_SHARED/data/gsm8k_solutions_6b.jsonl")
def test_the_published_labels_of_2638_solutions(tmp_path):
    counts = score.main(score.Config(data=str(GSM8K), directory=str(tmp_path / "run")))["number"]
    assert (counts["rows"], counts["failed"]) == (2638, 0)
    assert (counts["only_the_verifier"], counts["only_the_label"]) == (0, 0)


# ------------------------------------------------------------------------------------------------------------ evaluate


def records_of(kind: str, rewards: list[list], completions: list[list[str]]) -> list[dict]:
    return [{"kind": kind, "rewards": r, "completions": c} for r, c in zip(rewards, completions, strict=True)]


def test_the_numbers_by_hand():
    rewards = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, None, 1]]
    texts = [["4", "5", "4", "6"], ["1", "1", "2", "3"], ["7", "7", "8", "7"]]
    records = records_of("sampled", rewards, texts) + records_of("greedy", [[1], [0], [None]], [["4"], ["1"], ["8"]])
    cfg = evaluate.Config(model="", prompts="", n=4, k=(1, 2, 4))
    found = summarize(cfg, records, str.strip)
    means = {name: numbers["mean"] for name, numbers in found.items()}
    assert means["avg@4"] == means["pass@1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert means["pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert means["pass@4"] == pytest.approx(
        1 / 2
    )  # of the last prompt three are judged: not known, though one is right
    assert means["maj@1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert means["maj@2"] == pytest.approx((1 / 2 + 0 + 1) / 3)  # 4 or 5, 4 or 6: each half right
    assert means["maj@4"] == pytest.approx(1 / 2)
    assert found["pass@4"]["prompts"] == found["maj@4"]["prompts"] == 2
    assert means["greedy"] == 1 / 2
    assert found["greedy"]["prompts"] == 2  # one was not judged
    values = np.array([1 / 2, 0, 1])
    error = 1.96 * values.std(ddof=1) / np.sqrt(3)
    assert found["reward"]["high"] - found["reward"]["mean"] == pytest.approx(error)
    # Wilson's interval of 3 prompts: a share of 1/2 is half of the variance, so that 4 trials are worth 3/2 prompts.
    assert found["avg@4"]["low"] == pytest.approx(wilson(1 / 2, 3)[0])
    assert "maj@4" not in summarize(cfg, records, None)
    line = evaluate.sentence(found, records)
    assert re.search(r"pass@2 [\d.]+ \([^)]*\), pass@4 [\d.]+ \([^)]*\) without 1 of 3 prompts, ", line)
    assert line.endswith(" without 1 of 3 prompts; 2 completions not judged")


def wilson(share: float, trials: float) -> list[float]:
    """The p at which the share is 1.96 of its standard errors away: (share - p)² = 1.96² p (1 - p)/trials."""
    z = 1.96**2 / trials
    return sorted(np.roots([1 + z, -2 * share - z, share**2]))


def test_intervals_have_a_width_where_all_prompts_agree():
    for share in (0.0, 1.0):
        assert wilson_interval(np.full(40, share)) == pytest.approx(wilson(share, 40), abs=1e-6)
    assert wilson_interval(np.zeros(40))[1] > 0.05
    # Between them: each prompt half right in four trials, all the same: the trials are what is counted.
    assert wilson_interval(np.full(10, 0.5), trials=4) == pytest.approx(wilson(0.5, 40))
    half = np.arange(100) % 2
    assert wilson_interval(half, trials=8) == pytest.approx(wilson(0.5, 100))  # right in all trials or in none
    np.testing.assert_equal(standard_error_interval(np.array([1.0])), (np.nan, np.nan))


def test_wilson_intervals_hold_the_share_as_often_as_they_say():
    """Prompts of unequal difficulty, four trials each: 95 % of 2,000 intervals hold the mean share, ± 2 %."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        shares = draw.binomial(4, draw.beta(0.3, 1.2, 50)) / 4
        low, high = wilson_interval(shares, trials=4)
        held += low <= 0.2 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("evaluate")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    return str(root / "model")


def test_a_model_is_evaluated_and_a_stopped_run_goes_on(model, tmp_path, capsys):
    rows = [{"prompt": "once upon"[: 3 + i], "answer": "a"} for i in range(5)]
    cfg = evaluate.Config(
        model=model,
        prompts=write_prompts(tmp_path / "prompts.jsonl", rows),
        rewards=("text",),
        n=4,
        prompts_at_once=2,
        sampling=Sampling(max_tokens=2),
        directory=str(tmp_path / "run"),
        mesh=MeshShape(fsdp=1, tensor=-1),
    )
    found = evaluate.main(cfg)
    assert {*found} == {"avg@4", "greedy", "reward", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4))}
    assert "eval: avg@4 " in capsys.readouterr().out
    written = (tmp_path / "run" / "samples.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert Counter(record["kind"] for record in records) == {"sampled": 5, "greedy": 5}
    for record in records:
        texts = record["completions"]
        assert record["rewards"] == [exact_text(text, record["columns"]["answer"]) for text in texts]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == found
    again = evaluate.main(change(cfg, right=0.5, k=(1,)))  # counted again, sampled once
    assert {"pass@1", "maj@1"} <= again.keys()
    assert (tmp_path / "run" / "samples.jsonl").read_text() == written

    (tmp_path / "run" / "samples.jsonl").write_text(written[: len(written) // 3])
    assert evaluate.main(cfg) == found
    assert sorted((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == sorted(written.splitlines())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0, "greedy": False}, "n = 0, greedy = False"),
        ({"k": (9,)}, r"k = 9 of n = 8 completions; legal: 1 to 8"),
        ({"sampling__temperature": 0.0}, "temperature is 0: .* legal: --n 0"),
        ({"rewards": ("numbers",)}, "reward 'numbers'; legal: "),
        (COMPARING, r"reward\.compare = ranking .*: the greedy one stands alone; legal: --no_greedy"),
        ({**COMPARING, "n": 1}, "n = 1 leaves nothing to compare; legal: at least 2"),
        (
            {"weights__remat": "dots"},
            r"weights\.remat says how to train, and nothing is trained here; legal: ",
        ),
        ({"weights": Weights(adapter=Adapter(rank=2))}, r"weights\.adapter says how to train"),
    ],
)
def test_bad_settings_are_one_error(fields, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(change(evaluate.Config(model="/absent", prompts="/absent"), **fields))


@pytest.mark.parametrize("fields", [{**COMPARING, "n": 1}, {"weights__freeze": ("decoder",)}])
def test_bad_settings_of_best_of_n_are_one_error(fields):
    with pytest.raises(ValueError, match=r"n = 1 leaves nothing to compare|weights\.freeze says how to train"):
        best_of_n.main(change(best_of_n.Config(model="/absent", prompts="/absent"), **fields))


@pytest.mark.parametrize(
    "fields", [{"n": 4}, {"rewards": ("text",)}, {"sampling__temperature": 0.5}, {"template": "x"}]
)
def test_a_default_directory_is_that_of_all_settings(fields):
    cfg = evaluate.Config(model="/a", prompts="b")
    assert digest_of(asdict(change(cfg, **fields))) != digest_of(asdict(cfg))
    assert digest_of(asdict(change(cfg, directory="c"))) == digest_of(asdict(cfg))
