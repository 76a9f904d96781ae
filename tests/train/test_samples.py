import json
import math

import numpy as np
import pytest

from rljax.train.samples import round_or_none, sample_records, token_texts
from rljax.types import Batch, trajectory_of_tokens

LETTERS = "-abcdefghijklmnopqrstuvwxyz"
NAN = math.nan


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def batch():
    """Four rows: two answers to the prompt "ab" and two to "c". Prompts end in column 1, 0 is padding."""
    tokens = np.array([[1, 2, 4, 5, 6], [1, 2, 7, 0, 0], [0, 3, 8, 9, 0], [0, 3, 10, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    chosen = (segments > 0) & (np.arange(5) >= 2)
    last = chosen & (np.cumsum(chosen[:, ::-1], axis=1)[:, ::-1] == 1)
    reward = np.array([1.0, 0.5, NAN, 0.25])[:, None]
    traj = trajectory_of_tokens(
        tokens,
        segments,
        chosen,
        np.where(chosen, -np.arange(20).reshape(4, 5) / 3, 9.0).astype(np.float32),
        rewards=np.where(last, reward, 0.0).astype(np.float32),
        terminated=last & np.array([[False], [True], [True], [True]]),
        truncated=last & np.array([[True], [False], [False], [False]]),
        group=np.array([7, 7, 3, 3]),
        scores=np.array([[1, 0], [0.5, 0], [NAN, 0.123456], [0.25, 0]], np.float32),
    )
    mask = np.array(traj.mask)
    mask[0, 1] = False  # a filter dropped this decision
    return Batch(traj=traj, advantages=np.full((4, 4), 0.5, np.float32), mask=mask)


def test_a_record_by_hand():
    ratio = np.arange(16, dtype=np.float32).reshape(4, 4) / 1e4
    record = sample_records(20, batch(), decode, names=("exact", "judge"), token_columns={"log_ratio": ratio})[0]
    assert record == {
        "step": 20,
        "group": 7,
        "prompt": "ab",
        "completion": "def",
        "columns": {},
        "scores": {"exact": 1.0, "judge": 0.0},
        "reward": 1.0,
        "length": 3,
        "ended": False,
        "tokens": {
            "id": [1, 2, 4, 5, 6],
            "text": ["a", "b", "d", "e", "f"],
            "chosen": [0, 0, 1, 1, 1],
            "mask": [0, 0, 0, 1, 1],
            "advantage": [None, None, 0.5, 0.5, 0.5],
            "logp": [None, None, -0.6667, -1.0, -1.333],
            "log_ratio": [None, None, 0.0001, 0.0002, 0.0003],
        },
    }
    assert next(iter(record)) == "step"


def test_the_kl_to_the_reference_is_that_of_each_chosen_token():
    given = batch()
    reference = given.traj.replace(ref_logp=np.full((4, 4), -1.0, np.float32))
    record = sample_records(0, given.replace(traj=reference), decode, names=("exact", "judge"))[0]
    assert record["tokens"]["kl"] == [None, None, 0.3333, 0.0, -0.3333]


def test_padding_is_left_out_on_both_sides_and_what_is_not_judged_is_null():
    record = sample_records(0, batch(), decode, names=("exact", "judge"))[2]
    assert (record["prompt"], record["completion"]) == ("c", "hi")
    assert record["tokens"]["id"] == [3, 8, 9]
    assert record["tokens"]["logp"] == [None, -4.0, -4.333]
    assert record["scores"] == {"exact": None, "judge": 0.1235}
    assert record["reward"] is None
    assert record["ended"] is True
    assert record["length"] == 2
    assert "log_ratio" not in record["tokens"]
    json.dumps(record, allow_nan=False)


def test_limit_counts_prompts_and_groups_stay_together():
    records = sample_records(0, batch(), decode, names=("a", "b"), limit=1)
    assert [record["group"] for record in records] == [7, 7]
    scattered = batch()
    scattered = scattered.replace(traj=scattered.traj.replace(group=np.array([5, 2, 5, 2])))
    records = sample_records(0, scattered, decode, names=("a", "b"))
    assert [record["group"] for record in records] == [5, 5, 2, 2]
    assert [record["completion"] for record in records] == ["def", "hi", "g", "j"]


def test_dataset_columns_by_row_or_by_prompt():
    def columns(given):
        return [r["columns"] for r in sample_records(0, batch(), decode, names=("a", "b"), columns=given)]

    assert columns([{"answer": 3}, {"answer": [4]}]) == [{"answer": "3"}] * 2 + [{"answer": "[4]"}] * 2
    assert columns([{"n": n} for n in range(4)]) == [{"n": str(n)} for n in range(4)]
    with pytest.raises(ValueError, match="3 dicts of columns for 4 rows"):
        columns([{}] * 3)


def test_the_least_a_batch_can_hold():
    full = batch()
    bare = full.traj.replace(
        group=None, scores=None, rewards=None, terminated=None, truncated=None, segments=None, positions=None
    )
    record = sample_records(0, full.replace(traj=bare), decode)[1]
    assert (record["group"], record["scores"], record["reward"], record["ended"]) == (1, {}, None, None)
    assert record["tokens"]["id"] == [1, 2, 7]


def test_a_row_without_an_answer():
    full = batch()
    none = np.zeros((4, 4), bool)
    record = sample_records(0, full.replace(traj=full.traj.replace(mask=none), mask=none), decode, names=("a", "b"))[1]
    assert (record["prompt"], record["completion"], record["length"]) == ("abg", "", 0)
    empty = full.traj.replace(mask=none, segments=np.zeros((4, 4), int))
    record = sample_records(0, full.replace(traj=empty, mask=none), decode, names=("a", "b"))[1]
    assert (record["prompt"], record["tokens"]["id"], record["tokens"]["advantage"]) == ("", [], [])


def test_names_must_fit_the_scores():
    with pytest.raises(ValueError, match="1 names"):
        sample_records(0, batch(), decode, names=("only",))


def test_tokens_keep_the_space_that_lone_tokens_lose():
    words = {1: " once", 2: " upon", 3: "\ufffd", 4: "é"}

    def lossy(ids):  # as sentencepiece decodes: the first space goes; a character of two tokens shows only when whole
        text = "é" if list(ids) == [3, 4] else "".join(words[i] for i in ids)
        return text[1:] if text.startswith(" ") else text

    assert token_texts([1, 2, 2], lossy) == ["once", " upon", " upon"]
    assert token_texts([2, 3, 4], lossy) == ["upon", "\ufffd", "é"]
    assert token_texts([], lossy) == []


def test_a_token_and_a_pair_are_decoded_once_for_all_rows():
    tokens = np.tile([1, 2, 3], (6, 40))
    chosen = np.ones(tokens.shape, bool)
    traj = trajectory_of_tokens(tokens, chosen.astype(int), chosen, np.zeros(tokens.shape, np.float32))
    asked = []

    def count(ids):
        asked.append(tuple(ids))
        return decode(ids)

    records = sample_records(0, Batch(traj, np.zeros(traj.mask.shape, np.float32), traj.mask), count)
    assert records[0]["tokens"]["text"] == list("abc" * 40)
    few = [ids for ids in asked if 1 < len(ids) < 3 or ids in {(2,), (3,)}]
    assert sorted(few) == [(1, 2), (2,), (2, 3), (3,), (3, 1)]


def test_four_digits_that_count():
    assert [round_or_none(x) for x in (0.123456, -12345.6, 1e-9, 0.0)] == [0.1235, -12350.0, 1e-9, 0.0]
    assert [round_or_none(x) for x in (NAN, math.inf, np.float32(-math.inf))] == [None, None, None]


def test_a_completion_keeps_the_space_that_it_begins_with():
    """As under SentencePiece: the first space of what is decoded is left out."""

    def decode_words(ids):
        return " ".join(LETTERS[i] for i in ids)

    record = sample_records(0, batch(), decode_words, names=("a", "b"))[0]
    assert (record["prompt"], record["completion"]) == ("a b", " d e f")


def conversation():
    """Prompt "ab", turns "c" and "de" with rewards 0 and 1, and "xy" between them, which was not chosen."""
    tokens = np.array([[1, 2, 3, 24, 25, 4, 5], [1, 2, 3, 4, 0, 0, 0]])
    segments = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    chosen = np.array([[0, 0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]], bool)
    rewards = np.array([[0, 0, 0, 0, 0, 0.25, 0.75], [0, 0, 0, NAN, 0, 0, 0]])
    traj = trajectory_of_tokens(tokens, segments, chosen, np.zeros((2, 7)), rewards=rewards, group=np.array([0, 0]))
    return Batch(traj=traj, advantages=np.zeros((2, 6)), mask=traj.mask)


def test_a_conversation_has_its_turns_and_what_stood_between_them():
    several, single = sample_records(0, conversation(), decode, turn_notes=[["tool calls 1"], []])
    assert several["turns"] == [
        {"policy": 1, "text": "c", "start": 2, "end": 3, "reward": 0.0, "notes": "tool calls 1"},
        {"policy": 0, "text": "xy", "start": 3, "end": 5},
        {"policy": 1, "text": "de", "start": 5, "end": 7, "reward": 1.0, "notes": ""},
    ]
    assert several["completion"] == "cxyde"
    assert "".join(several["tokens"]["text"][turn["start"] : turn["end"]][0] for turn in several["turns"]) == "cxd"
    assert "turns" not in single


def test_a_turn_that_was_not_judged_has_no_reward():
    unjudged = conversation()
    rewards = np.where(np.asarray(unjudged.traj.rewards) == 0.75, NAN, unjudged.traj.rewards)
    record = sample_records(
        0, Batch(unjudged.traj.replace(rewards=rewards), unjudged.advantages, unjudged.mask), decode
    )[0]
    assert [turn.get("reward") for turn in record["turns"]] == [0.0, None, None]
