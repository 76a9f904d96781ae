"""rlhf.py: the data between its stages, and on a tiny model that each stage takes what the last one left."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import rlhf
from experiments.common import data
from models import tiny
from rljax.data.examples import comparison
from rljax.data.tokenizer import load_tokenizer
from rljax.models import heads, hf
from test_grpo_experiment import RAW, write_prompts, write_tokenizer

JUDGED = [
    {"number": 0, "prompt": "a", "completions": [" b. c! d? e.", " b.", ' "b." c. "d!" e'], "rewards": [0.0, 1.0, 1.0]},
    {"number": 1, "prompt": "b", "completions": [" x. y. z."], "rewards": [0.5]},
]
JUDGED[0]["ended"], JUDGED[1]["ended"] = [False, True, True], [True]


def test_a_demonstration_is_the_first_sentences():
    assert rlhf.first_sentences(JUDGED, 3) == [
        {"prompt": "a", "completion": " b. c! d?"},
        {"prompt": "a", "completion": ' "b." c. "d!"'},
        {"prompt": "b", "completion": " x. y. z."},
    ]


def test_equal_completions_are_no_comparison():
    worse = JUDGED[0]["completions"][0]
    rows = rlhf.comparisons(JUDGED, most=5, seed=0)
    assert sorted(row.pop("chosen") for row in rows) == sorted(JUDGED[0]["completions"][1:])
    assert rows == [{"prompt": "a", "rejected": worse, "ended": [True, False]}] * 2
    assert len(rlhf.comparisons(JUDGED, most=1, seed=0)) == 1


def test_what_the_rule_left_unjudged_is_no_comparison():
    record = JUDGED[0] | {"rewards": [0.0, None, 1.0]}
    (row,) = rlhf.comparisons([record], most=5, seed=0)
    assert (row["chosen"], row["rejected"]) == (record["completions"][2], record["completions"][0])


def test_comparisons_of_several_openings_are_held_out(tmp_path):
    write_tokenizer(tiny.write(tmp_path / "model", RAW, {}))
    tokenizer = load_tokenizer(tmp_path / "model")
    cfg = rlhf.Config("model", comparisons=5)
    letters = "abcdefghijklmnopqrst"
    rows = [{"prompt": letter, "chosen": f" {k} b", "rejected": " c"} for letter in letters for k in range(5)]
    settings = rlhf.preference_data(cfg, rlhf.write_rows(tmp_path / "rows.jsonl", rows))
    found = data.read_examples(settings, comparison, tokenizer, 64, 0)
    assert len({tuple(pair.chosen.prompt) for pair in found.eval}) == rlhf.HELD_OUT == 8
    assert len(found.eval) == 40


def test_nothing_to_write_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="no row to write; legal: other prompts"):
        rlhf.write_rows(tmp_path / "rows.jsonl", [])


@pytest.mark.parametrize("others", [("dpo",), pytest.param(("rloo", "grpo", "dpo"), marks=pytest.mark.nightly)])
def test_each_stage_takes_what_the_last_one_left(others, tmp_path, monkeypatch):
    """The model writes single letters: sentences and animals are made up here."""
    write_tokenizer(tiny.write(tmp_path / "model", RAW, tiny.tensors_of(RAW)))
    rows = [{"prompt": "once upon a"[: 3 + i]} for i in range(8)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    monkeypatch.setattr(rlhf, "SENTENCE", rlhf.re.compile(r"[a-z]"))
    cfg = rlhf.Config(
        model=str(tmp_path / "model"), prompts=prompts, eval_prompts=4, eval_samples=8, sentences=2, n=4, compared=4
    )
    cfg = dataclasses.replace(cfg, max_tokens=8, batch_size=32, sft_steps=1, reward_steps=1, steps=1)
    cfg = dataclasses.replace(cfg, rule="think", directory=str(tmp_path / "road"))
    monkeypatch.setattr(rlhf, "comparisons", lambda judged, most, seed: [two_of(record) for record in judged])
    found = rlhf.main(cfg)
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-5)
    assert_stages_follow(tmp_path / "road", tmp_path / "model", "sft", "reward_model", "ppo")
    openings = (tmp_path / "road" / "openings.jsonl").read_text().splitlines()
    assert len(openings) == 4
    for changed in ({"comparisons": 3}, {"sentences": 1}, {"eval_prompts": 3}, {"compared": 2}):
        name, value = next(iter(changed.items()))
        with pytest.raises(ValueError, match=rf"holds stages of other settings: {name} = \d+, now {value}; legal: "):
            rlhf.main(dataclasses.replace(cfg, **changed))
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "once upon"[: 2 + i]} for i in range(8)])
    with pytest.raises(ValueError, match=r"prompts\.jsonl has changed since .* was begun: name another --directory"):
        rlhf.main(cfg)
    write_prompts(tmp_path / "prompts.jsonl", rows)
    assert (tmp_path / "road" / "openings.jsonl").read_text().splitlines() == openings
    for algorithm in others:  # from the stages that are there: the same completions, judged in another program
        other = rlhf.main(dataclasses.replace(cfg, algorithm=algorithm, dpo_steps=1))
        for name in ("reward", "error"):
            assert other["before"][name] == pytest.approx(found["before"][name], abs=1e-5)
        assert other["before"]["kl"] == pytest.approx(0, abs=1e-5)
        assert_stages_follow(tmp_path / "road", tmp_path / "model", algorithm)


def assert_stages_follow(road: Path, model: Path, *stages: str) -> None:
    """Each began with the model of the stage before it, and left another; the reward model judges the last one."""
    judge = str(road / "reward_model" / "model")
    for stage in stages:
        settings = json.loads((road / stage / "config.json").read_text())["config"]
        begun_as = model if stage == "sft" else road / "sft" / "model"
        assert settings["model"] == str(begun_as)
        assert stage not in ("ppo", "rloo", "grpo") or settings["rewards"][0] == judge
        assert stage != "ppo" or settings["critic_model"] == judge
        first, last = (load_file(place / "model.safetensors") for place in (begun_as, road / stage / "model"))
        assert [name for name in first if name in last and np.array_equal(first[name], last[name])] == []
        assert set(last) - set(first) == ({"score.weight"} if stage == "reward_model" else set())
    config = hf.read_config(road / "sft" / "model")
    fresh = heads.with_score_head({}, config, jax.random.fold_in(jax.random.key(0), 4))["score_head"]
    assert 0 < np.abs(hf.load_score_head(judge) - fresh).max() < 0.01  # a random one, after one step


def two_of(record: dict) -> dict:
    first, second, *_ = record["completions"]
    return {"prompt": record["prompt"], "chosen": first, "rejected": second, "ended": record["ended"][:2]}
