"""A server's answers as a trajectory: that of the sampler where they are right, one clear error where they are not."""

import re

import numpy as np
import pytest

from rljax.rollouts.remote import (
    UNKNOWN_VERSION,
    ServerAnswerError,
    completion_request,
    read_completions,
    sample_remote,
)
from rljax.types import PromptBatch, Resume, Sampling

SAMPLING = Sampling(n=2, max_tokens=3, stop=(0, 9), temperature=0.7)
PROMPTS = PromptBatch(
    np.array([[0, 5, 6], [1, 2, 3]], np.int32),
    np.array([[False, True, True], [True, True, True]]),
    np.array([4, 7], np.int32),
    [{}, {}],
    0,
)
BODY = completion_request("m", [5, 6], SAMPLING, seed=1, step=3, number=4)


def choice(index: int, ids: list[int], logp: list[float] | None = None, reason: str = "length", **more) -> dict:
    logp = [-0.5 - token for token in ids] if logp is None else logp
    return {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": logp}, "finish_reason": reason} | more


def answer(*choices: dict, version: str | None = "3", **more) -> dict:
    return {"model": "m", "choices": list(choices), "metadata": {"weight_version": version}, **more}


GOOD = answer(choice(1, [4, 0], reason="stop"), choice(0, [1, 2, 3], prompt_token_ids=[5, 6]))


def test_a_request_asks_for_ids_and_logprobs():
    assert BODY.pop("seed") != completion_request("m", [5, 6], SAMPLING, 1, 3, 5)["seed"]
    assert BODY == {
        **{"model": "m", "prompt": [5, 6], "n": 2, "max_tokens": 3, "temperature": 0.7, "key": [3, 4]},
        **{"stop_token_ids": [0, 9], "logprobs": 1, "return_token_ids": True},
        # what a server would take from the model's generation_config.json
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
    }


def test_answers_become_a_trajectory():
    asked = []

    def ask_all(bodies):
        asked.extend(bodies)
        return [GOOD, answer(choice(0, [9], reason="stop"), choice(1, [7, 8, 7]))]

    sampling = SAMPLING.replace(temperature=np.array([0.7, 1.5]))
    traj = sample_remote(ask_all, "m", PROMPTS, sampling, seed=1, step=3, vocab_size=10, version="3")
    assert [body["prompt"] for body in asked] == [[5, 6], [1, 2, 3]]
    assert [body["key"] for body in asked] == [[3, 4], [3, 7]]
    np.testing.assert_array_equal(traj.group, [4, 4, 7, 7])
    np.testing.assert_array_equal(traj.inputs, [[0, 5, 6, 1, 2], [0, 5, 6, 4, 0], [1, 2, 3, 9, 0], [1, 2, 3, 7, 8]])
    chosen = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(traj.mask, chosen)
    np.testing.assert_array_equal(np.where(traj.mask, traj.actions, -1)[0], [-1, -1, 1, 2, 3])
    np.testing.assert_allclose(np.where(traj.mask, traj.logp, 0)[1], [0, 0, -4.5, -0.5, 0])
    np.testing.assert_array_equal(traj.terminated.sum(1), [0, 1, 1, 0])
    np.testing.assert_array_equal(traj.truncated, [[0, 0, 0, 0, 1], [0] * 5, [0] * 5, [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(traj.version, 3 * np.array(chosen))
    np.testing.assert_allclose(traj.temperature, np.float32([[0.7], [0.7], [1.5], [1.5]]).repeat(5, axis=1))
    assert [body["temperature"] for body in asked] == [0.7, 1.5]
    np.testing.assert_array_equal(traj.positions[0], [0, 0, 1, 2, 3])


def test_a_version_that_is_not_asked_for_is_kept():
    assert {found.version for found in read_completions(BODY, GOOD, 10, None)} == {3}
    for told, number in {
        "f0:7": 7,
        7: 7,
        "default": UNKNOWN_VERSION,
        "": UNKNOWN_VERSION,
        10**30: UNKNOWN_VERSION,
    }.items():
        found = read_completions(BODY, {**GOOD, "metadata": {"weight_version": told}}, 10, None)
        assert {completion.version for completion in found} == {number}
    unknown = {**GOOD, "metadata": None}
    assert {found.version for found in read_completions(BODY, unknown, 10, None)} == {UNKNOWN_VERSION}


FIRST = choice(0, [1, 2, 3])
WRONG = [
    ("a text", "the server answered 'a text'; legal: a JSON object with `choices`"),
    ({**GOOD, "model": "other"}, "the server answered with the model 'other', not 'm'"),
    ({**GOOD, "metadata": {"weight_version": "2"}}, "answered with version 2 of the weights, the trainer's is 3"),
    ({**GOOD, "metadata": {"weight_version": "f0:3"}}, "answered with version f0:3 of the weights, the trainer's is 3"),
    ({**GOOD, "metadata": {"weight_version": "default"}}, "answered with version default of the weights"),
    ({**GOOD, "metadata": [1]}, "tells no version, the trainer's is 3"),
    ({**GOOD, "metadata": {"weight_version": 3.7}}, "tells no version, the trainer's is 3"),
    (answer("x", FIRST), "the server gave the choice 'x'; legal: an object with its `index`"),
    (answer(FIRST, choice("1", [1])), "legal: an object with its `index`"),
    (answer(FIRST), "the server gave 1 completions; legal: 2"),
    (answer(FIRST, choice(1, [1], logprobs=[1])), "gives no log-probs"),
    (answer(FIRST, {"index": 1, "text": "hi", "finish_reason": "stop"}), "gives no token ids"),
    (answer(FIRST, {"index": 1, "token_ids": [1], "finish_reason": "length"}), "gives no log-probs"),
    (answer(FIRST, choice(1, [1], prompt_token_ids=[1, 5, 6])), "read another prompt than the ids it was sent"),
    (answer(FIRST, choice(1, [1, 2], [-1.0])), "2 tokens and 1 log-probs; legal: equally many"),
    (answer(FIRST, choice(1, [])), "0 tokens and 0 log-probs"),
    (answer(FIRST, choice(1, [1, 2, 3, 4])), "4 tokens and 4 log-probs; legal: equally many, at most 3"),
    (answer(FIRST, choice(1, [10])), "gave the id 10; legal: below the trainer's 10"),
    (answer(FIRST, choice(1, ["1"], [-1.0])), "gave the id '1'"),
    (answer(FIRST, choice(1, [1], [float("nan")])), "gave the log-prob nan"),
    (answer(FIRST, choice(1, [1], [0.5])), "gave the log-prob 0.5"),
    (
        answer(FIRST, choice(1, [1, 2], reason="stop")),
        "ended by 'stop' with the ids ... [1, 2]; legal: a stop is the last",
    ),
    (answer(FIRST, choice(1, [1, 0, 2])), "ended by 'length' with the ids ... [1, 0, 2]"),
]


@pytest.mark.parametrize(("found", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_an_answer_that_is_none(found, message):
    with pytest.raises(ServerAnswerError, match=re.escape(message)):
        read_completions(BODY, found, 10, "3")


@pytest.mark.parametrize(
    "change",
    [{"top_p": 0.9}, {"top_k": 3}, {"min_tokens": 2}, {"support": 4}, {"temperature": 0.0}, {"max_concurrent": 2}],
)
def test_settings_that_a_server_is_not_asked_for(change):
    with pytest.raises(ValueError, match="legal with a server"):
        sample_remote(None, "m", PROMPTS, SAMPLING.replace(**change), 0, 0, 10, "0")
    resumed = PROMPTS._replace(resume=Resume(np.array([[0, 0]])))
    with pytest.raises(ValueError, match="resume is set; legal with a server"):
        sample_remote(None, "m", resumed, SAMPLING, 0, 0, 10, "0")
