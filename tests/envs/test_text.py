"""The protocol of text environments: what breaks it is one error that names it, or a counted turn; nothing hangs."""

import threading

import numpy as np
import pytest

from rljax.envs.deadline import MAX_LEFT_BEHIND, call_each
from rljax.envs.text import TextEnv, TextEnvError, TextStep, TurnLimits, begin_each, cut_middle, play_each

LIMITS = TurnLimits(timeout_seconds=5.0, max_characters=40)


def env_that(step=None, reset=None) -> TextEnv:
    return TextEnv("odd", reset or (lambda row, seed: ((row, seed), "begin")), step)


def played(returned, limits=LIMITS):
    def step(state, text):
        if isinstance(returned, Exception):
            raise returned
        return returned

    (turn,) = play_each(env_that(step), ["state"], ["words"], limits)
    return turn


def test_turns_keep_their_order_and_their_states():
    def step(state, text):
        return TextStep(state + 1, f"{text}{state}", reward=state / 2, terminated=state == 3, info={"seen": 1})

    turns = play_each(env_that(step), [1, 2, 3], "abc", LIMITS)
    assert [turn.step.observation for turn in turns] == [
        [{"role": "user", "content": text}] for text in ("a1", "b2", "c3")
    ]
    assert [(turn.step.state, turn.step.reward, turn.step.terminated) for turn in turns] == [
        (2, 0.5, False),
        (3, 1.0, False),
        (4, 1.5, True),
    ]
    assert {turn.status for turn in turns} == {"ok"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None; legal: a TextStep"),
        (("state", "text", 0.0, False, False), "legal: a TextStep"),
        (TextStep(0, b"bytes"), "the observation is b'bytes'; legal: a text, or a list of messages"),
        (TextStep(0, [{"role": "tool", "content": None}]), "a message is .*; legal: {'role': text, 'content': text}"),
        (TextStep(0, ["text"]), "a message is 'text'"),
        (TextStep(0, reward=float("nan")), "the reward is nan; legal: a finite number, or None"),
        (TextStep(0, reward=np.float32("inf")), "the reward is .*inf"),
        (TextStep(0, reward="1"), "the reward is '1'"),
        (TextStep(0, reward=np.ones(2)), "the reward is array"),
        (TextStep(0, terminated=1), "terminated is 1; legal: True or False"),
        (TextStep(0, terminated=True, truncated=True), "terminated and truncated; legal: one of them"),
        (TextStep(0, info={"calls": "two"}), "info is {'calls': 'two'}; legal: names with finite numbers"),
    ],
)
def test_what_is_not_of_the_protocol_is_one_error_that_names_the_environment(returned, message):
    with pytest.raises(TextEnvError, match=f"step of the environment odd after 'words'.*{message}"):
        played(returned)


@pytest.mark.parametrize("reward", [True, np.float32(0.5), np.array(2), 10**30])
def test_numbers_of_every_kind_are_rewards(reward):
    assert played(TextStep(0, reward=reward)).status == "ok"


def test_a_turn_that_raises_or_cannot_be_judged_has_no_reward():
    turn = played(ZeroDivisionError("oh"))
    assert (turn.status, turn.detail, turn.step.reward, turn.step.truncated) == (
        "raised",
        "ZeroDivisionError: oh",
        None,
        True,
    )
    turn = played(TextStep(0, "go on", reward=None))
    assert (turn.status, turn.step.reward, turn.step.truncated) == ("unjudged", None, False)


def test_a_turn_that_hangs_is_left_behind_and_the_others_are_played():
    release = threading.Event()

    def step(state, text):
        if text == "hang":
            release.wait()
        return TextStep(state, text)

    limits = LIMITS._replace(timeout_seconds=0.2, workers=2)
    try:
        turns = play_each(env_that(step), range(5), ["a", "hang", "b", "hang", "c"], limits)
        assert [turn.status for turn in turns] == ["ok", "timeout", "ok", "timeout", "ok"]
        assert turns[1].step.truncated
        assert turns[1].step.reward is None
        assert turns[1].detail == "no answer within 0.2 s"
        assert turns[4].step.observation == [{"role": "user", "content": "c"}]
        more = MAX_LEFT_BEHIND - 2
        play_each(env_that(step), range(more), ["hang"] * more, limits._replace(workers=more))
        with pytest.raises(
            TextEnvError, match=f"environment odd: {MAX_LEFT_BEHIND} calls still run past their deadline"
        ):
            play_each(env_that(step), [0], ["a"], limits)
    finally:
        release.set()


def test_an_exit_of_the_code_that_is_called_ends_no_run():
    def leave():
        raise SystemExit(3)

    done = call_each([leave, lambda: 7], 5.0, 1, "leave")
    assert [(called.status, called.value) for called in done] == [("raised", None), ("ok", 7)]
    assert done[0].detail == "SystemExit: 3"


def test_ten_megabytes_are_cut_and_say_so():
    turn = played(TextStep(0, "a" * 5_000_000 + "b" * 5_000_000))
    assert turn.step.observation[0]["content"] == "a" * 20 + "\n[9,999,960 characters cut]\n" + "b" * 20
    assert turn.cut_characters == 9_999_960
    assert cut_middle("abcde", 5) == "abcde"
    assert cut_middle("abcde", 3) == "a\n[2 characters cut]\nde"


def test_characters_that_are_no_unicode_do_not_reach_a_tokenizer():
    assert played(TextStep(0, "a\ud800b")).step.observation[0]["content"] == "a?b"


def test_episodes_begin_with_row_and_seed():
    begun = begin_each(env_that(), [{"x": 1}, {"x": 2}], [5, 6], LIMITS)
    assert begun == [(({"x": x}, seed), [{"role": "user", "content": "begin"}]) for x, seed in ((1, 5), (2, 6))]


def test_a_prompt_longer_than_an_observation_may_be_stays_whole():
    problem = "a\ud800b" * 1000
    ((_, messages),) = begin_each(env_that(reset=lambda row, seed: (0, problem)), [{}], [0], LIMITS)
    assert messages == [{"role": "user", "content": "a?b" * 1000}]


def fails(row, seed):
    raise KeyError("question")


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (fails, "KeyError: 'question'"),
        (lambda row, seed: "text", "returned 'text'; legal: \\(state, observation\\)"),
        (lambda row, seed: (0, ""), "returned no text to begin with"),
        (lambda row, seed: (0, 3), "the observation is 3"),
    ],
)
def test_an_episode_that_does_not_begin_is_an_error(reset, message):
    with pytest.raises(TextEnvError, match=f"reset of the environment odd, row {{'x': 1}}.*{message}"):
        begin_each(env_that(reset=reset), [{"x": 1}], [0], LIMITS)
