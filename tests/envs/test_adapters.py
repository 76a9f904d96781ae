"""Environments of other packages in turns, against the packages themselves. Skipped where a package is absent."""

import gc
import re
import sys

import pytest

from rljax.envs.gymnasium import make_gymnasium
from rljax.envs.reasoning_gym import make_reasoning_gym
from rljax.envs.text import TurnLimits, begin_each, play_each
from rljax.envs.verifiers import make_verifiers

LIMITS = TurnLimits(timeout_seconds=60.0)


def test_a_maze_of_gymnasium_is_played_in_words():
    gymnasium = pytest.importorskip("gymnasium")

    def make():
        return gymnasium.make("FrozenLake-v1", render_mode="ansi", is_slippery=False, desc=["SF", "HG"])

    env = make_gymnasium(make, "lake", "Reach G.", actions=("left", "down", "right", "up"))
    ((state, prompt),) = begin_each(env, [{}], [3], LIMITS)
    assert prompt[0]["content"] == "Reach G.\n[S]F\nHG"
    wanted = make()
    wanted.reset(seed=3)
    for words, action in (("I go left.", 0), ("Not left but right", 2), ("down", 1)):
        (turn,) = play_each(env, [state], [words], LIMITS)
        _, reward, terminated, truncated, _ = wanted.step(action)
        assert turn.step[2:5] == (reward, terminated, truncated)
    assert (turn.step.reward, turn.step.terminated) == (1.0, True)
    (turn,) = play_each(env, [env.reset({}, 0)[0]], ["hm"], LIMITS)
    assert turn.step.observation[0]["content"] == "Answer one of: left, down, right, up."
    assert turn.step.info == {"illegal_moves": 1}


def test_numbered_actions_and_observations_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    env = make_gymnasium(lambda: gymnasium.make("Blackjack-v1"), "blackjack", "0 sticks, 1 hits.")
    state, prompt = env.reset({}, 1)
    wanted = gymnasium.make("Blackjack-v1")
    observation, _ = wanted.reset(seed=1)
    assert prompt == f"0 sticks, 1 hits.\n{observation}"
    assert "no legal action: Discrete(2)" in env.step(state, "7").observation
    step = env.step(state, "I stick: 0")
    _, reward, terminated, _, _ = wanted.step(0)
    assert (step.reward, step.terminated) == (reward, terminated)


def test_texts_of_gymnasium_are_the_turns():
    gymnasium = pytest.importorskip("gymnasium")

    class Echo(gymnasium.Env):
        action_space = gymnasium.spaces.Text(5, charset="ab")
        observation_space = gymnasium.spaces.Text(20)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            return f"say {self.np_random.choice(['a', 'b'])}", {}

        def step(self, action):
            return f"you said {action}", len(action) / 2, True, True, {}

    env = make_gymnasium(Echo, "echo")
    state, prompt = env.reset({}, 5)
    assert prompt == Echo().reset(seed=5)[0]
    assert env.step(state, "no").info == {"illegal_moves": 1}
    step = env.step(state, "abb")
    assert step[1:5] == ("you said abb", 1.5, True, False)  # ended both ways: it is over, not cut


def test_environments_of_gymnasium_are_closed():
    gymnasium = pytest.importorskip("gymnasium")
    made = []

    class Counted(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2)
        observation_space = gymnasium.spaces.Discrete(2)
        closed = 0

        def __init__(self):
            made.append(self)

        def reset(self, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 1, 1.0, action == 1, False, {}

        def close(self):
            self.closed += 1

    env = make_gymnasium(Counted, "counted")
    begun = begin_each(env, [{}] * 3, range(3), LIMITS)  # over, in the middle, only begun
    played = play_each(env, [state for state, _ in begun[:2]], ["1", "0"], LIMITS)
    assert [turn.step.terminated for turn in played] == [True, False]
    assert [one.closed for one in made] == [1, 0, 0, 0]
    del begun, played
    gc.collect()
    assert [one.closed for one in made] == [1, 1, 1, 1]


def test_what_cannot_be_played_in_words():
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match="pendulum: actions are a Box; legal: Text and Discrete"):
        make_gymnasium(lambda: gymnasium.make("Pendulum-v1"), "pendulum")
    with pytest.raises(ValueError, match="1 names for actions that are Discrete"):
        make_gymnasium(lambda: gymnasium.make("Blackjack-v1"), "blackjack", actions=("hit",))


def test_tasks_of_reasoning_gym():
    package = pytest.importorskip("reasoning_gym")
    env, rows = make_reasoning_gym("chain_sum", size=5, seed=2, min_terms=2, max_terms=3)
    dataset = package.create_dataset("chain_sum", size=5, seed=2, min_terms=2, max_terms=3)
    assert [row["question"] for row in rows] == [entry["question"] for entry in dataset]
    begun = begin_each(env, rows, range(5), LIMITS)
    for text in ("{}", "It is <answer>{}</answer>, I think", "It is {}", "no idea"):
        texts = [text.format(row["answer"]) for row in rows]
        turns = play_each(env, [state for state, _ in begun], texts, LIMITS)
        answers = [re.sub(r".*<answer>(.*)</answer>.*", r"\1", text) for text in texts]
        assert [turn.step.reward for turn in turns] == [
            dataset.score_answer(answer, entry) for answer, entry in zip(answers, dataset, strict=True)
        ]
        assert all(turn.step.terminated for turn in turns)
    assert turns[0].step.reward < 1
    with pytest.raises(ValueError, match=r"reasoning-gym: .*no_such_task"):
        make_reasoning_gym("no_such_task", size=1)


@pytest.mark.nightly  # importing the package takes several seconds
@pytest.mark.filterwarnings("default")  # those of its dependencies
def test_tasks_of_verifiers():
    vf = pytest.importorskip("verifiers.v1")

    class Data(vf.TaskData):
        answer: str

    class Sum(vf.Task[Data]):
        @vf.reward
        async def right(self, trace) -> float:
            return float(trace.last_reply == self.data.answer)

        @vf.reward(weight=0.5)
        async def short(self, trace) -> float:
            return float(len(trace.last_reply) < 5)

        @vf.metric
        async def letters(self, trace) -> float:
            return len(trace.last_reply)

    class Sums(vf.Taskset[Sum]):
        def load(self):
            for i in range(3):
                yield Sum(Data(prompt=f"{i}+1?", answer=str(i + 1), system_prompt="Add."), self.config.task)

    env, rows = make_verifiers(Sums(vf.TasksetConfig()), "sums")
    begun = begin_each(env, rows, range(3), LIMITS)
    assert begun[2][1] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+1?"}]
    turns = play_each(env, [state for state, _ in begun], ["1", "It is 2", "4"], LIMITS)
    assert [turn.step.reward for turn in turns] == [1.5, 0.0, 0.5]
    assert [turn.step.info["letters"] for turn in turns] == [1.0, 7.0, 1.0]
    with pytest.raises(ValueError, match="task 0 of verifiers has no prompt"):
        make_verifiers([Sum(Data(answer=""))])
    with pytest.raises(ValueError, match="task 0 of verifiers needs a container"):
        make_verifiers([Sum(Data(prompt="?", answer="", image="debian"))])


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("gymnasium", lambda: make_gymnasium(lambda: None, "x"), "agents"),
        ("reasoning_gym", lambda: make_reasoning_gym("chain_sum", 1), "agents"),
        ("verifiers.v1", lambda: make_verifiers([]), "verifiers"),
    ],
)
def test_without_the_package_the_error_says_what_to_install(package, call, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"is not installed: pip install 'rljax\[{extra}\]'"):
        call()
