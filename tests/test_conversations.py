"""A text environment in conversations that are sampled: what is trained, that no id changes, and what fails."""

import dataclasses
import re
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import agent_grpo
from experiments.common import conversations, environments
from experiments.common.algorithms import critic_free
from experiments.common.conversations import SEED, ConversationSettings, make_codec, make_converse
from rljax.data.chat import encode_prompt
from rljax.data.tokenizer import character_tokenizer, load_tokenizer
from rljax.envs.text import TextEnv, TextEnvError, TextStep, TurnLimits
from rljax.envs.tools import ToolUnavailable
from rljax.rewards import sandbox
from rljax.rewards.sandbox import SandboxError
from rljax.types import LM, Observation, Sampling, TrainState, Turn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "agents.md"
TOKENIZER = character_tokenizer("".join(map(chr, range(32, 127))))
STOP = TOKENIZER.stop[0]
PROMPT = "{} Write <expression> to calculate, and the number alone when you know it."
STATE = TrainState(0, {}, None, jax.random.key(0))


def policy_that_writes(script: dict[str, str]) -> LM:
    """A language model whose next character depends on the last one alone; after other characters it stops."""
    table = np.full((TOKENIZER.size, TOKENIZER.size), -30.0, np.float32)
    for last in range(TOKENIZER.size):
        character = TOKENIZER.decode([last])
        table[last, TOKENIZER.encode(script[character])[0] if character in script else STOP] = 30.0

    def same_cache(cache, *_):
        return cache

    return LM(
        init_cache=lambda rows, length: {"rows": jnp.zeros((rows, 1))},
        forward=lambda params, frozen, tokens, positions, segments, cache: (
            jax.nn.one_hot(tokens, TOKENIZER.size),
            cache,
        ),
        logits=lambda params, frozen, hidden: hidden @ table,
        gather=lambda cache, rows: {"rows": cache["rows"][rows]},
        scatter=lambda cache, rows, other: cache,
        fork=same_cache,
        grow=same_cache,
        crop=same_cache,
    )


def converse_with(env, script, rows, n=2, limits=TurnLimits(), **settings):  # noqa: B008 (immutable)
    """(the rollout, the prompts) of the scripted policy."""
    codec = make_codec(TOKENIZER)
    sampling = Sampling(n=n, max_tokens=12, stop=(STOP,))
    settings = {"max_turns": 4, "max_context": 160} | settings
    how = ConversationSettings(env, codec, limits, sampling, seed=0, **settings)
    prompts = conversations.environment_prompts(env, rows, codec, 150, 0, limits).first(len(rows))
    return make_converse(policy_that_writes(script), how)(STATE, prompts, 0), prompts


@pytest.fixture(scope="module")
def user_code():
    """The environment of docs/agents.md."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    module = types.ModuleType("user_code")
    exec(code, module.__dict__)
    return module


def pieces(traj, row):
    """The text of a row, what the policy chose in brackets."""
    ids = [int(traj.inputs[row, 0]), *np.asarray(traj.actions[row]).tolist()]
    chosen = np.append(False, np.asarray(traj.mask[row]))
    present = np.append(True, np.asarray(traj.segments[row]) > 0)
    text = ""
    for i, token in enumerate(ids):
        opens = bool(chosen[i] and not chosen[i - 1])
        closes = bool(not chosen[i] and i > 0 and chosen[i - 1])
        text += (
            "[" * opens
            + "]" * closes
            + ("|" if token == STOP and chosen[i] else TOKENIZER.decode([token]) * int(present[i]))
        )
    return text + "]" * bool(chosen[-1])


def test_a_calculator_in_thirty_lines_of_user_code(user_code):
    """Only what the model chose is trained, its ids are those that were sampled, each turn has its reward."""
    script = {".": "<", "<": "1", "1": "+", "+": "2", "2": ">", ";": "3"}
    rows = [{"question": "1+2?", "answer": "3"}, {"question": "2+2?", "answer": "4"}]
    rollout, _ = converse_with(user_code.env, script, rows)
    for row, question in enumerate(["1+2?", "1+2?", "2+2?", "2+2?"]):
        assert pieces(rollout.traj, row) == PROMPT.format(question) + "[<1+2>|]3;[3|]"
        turn_rewards = np.asarray(rollout.traj.rewards)[row][np.asarray(rollout.traj.step_ends)[row]]
        np.testing.assert_array_equal(turn_rewards, [0.0, float(row < 2)])
    np.testing.assert_array_equal(rollout.traj.scores[:, 0], [1, 1, 0, 0])
    assert np.asarray(rollout.traj.terminated).sum() == 4
    assert rollout.metrics["conversation/tool_calls"] == 1.0
    assert rollout.metrics["conversation/turns"] == 2.0
    assert conversations.turn_notes(rollout.conversations)[0] == ["tool calls 1", ""]


def test_an_expression_that_does_not_parse_is_answered(user_code):
    rollout, _ = converse_with(
        user_code.env, {".": "<", "<": "+", "+": ">", ";": "3"}, [{"question": "?", "answer": "3"}]
    )
    assert "[<+>|]'+' is no arithmetic; legal: numbers, + - * / // % ** and parentheses;[3|]" in pieces(rollout.traj, 0)
    assert rollout.traj.scores[0, 0] == 1


def test_a_time_out_is_counted_and_has_no_reward(user_code):
    release = threading.Event()

    def step(row, text):
        if row["question"] == "hang":
            release.wait()
        return user_code.step(row, text)

    env = user_code.env._replace(step=step)
    rows = [{"question": "hang", "answer": "3"}, {"question": "1+2?", "answer": "3"}]
    limits = TurnLimits(timeout_seconds=0.3)
    try:
        rollout, _ = converse_with(env, {".": "3"}, rows, n=1, limits=limits)
        np.testing.assert_array_equal(rollout.traj.scores[:, 0], [np.nan, 1])
        assert rollout.metrics["conversation/frac_timeout"] == 0.5
        truncated = np.asarray(rollout.traj.truncated & rollout.traj.mask).any(axis=1)
        np.testing.assert_array_equal(truncated, [True, False])
        assert conversations.turn_notes(rollout.conversations)[0] == ["timeout: no answer within 0.3 s"]
        with pytest.raises(TextEnvError, match=r"my calculator left 1 of 2 conversations without a reward: timeout 1"):
            converse_with(env, {".": "3"}, rows, n=1, limits=limits, max_failed=0.4)
    finally:
        release.set()


def test_a_turn_without_a_reward_counts_once_wherever_it_stands():
    """Two of three turns are not judged, and then the task is over with a reward: one conversation without one."""

    def step(turn, text):
        return TextStep(turn + 1, ";", None if turn < 2 else 1.0, terminated=turn == 2)

    env = TextEnv("shy", lambda row, seed: (0, "begin."), step)
    rollout, _ = converse_with(env, {".": "3"}, [{}], n=4, max_failed=1.0)
    assert rollout.metrics["conversation/frac_unjudged"] == 1.0
    assert rollout.metrics["conversation/turns"] == 3.0
    assert np.isnan(rollout.traj.scores).all()
    with pytest.raises(TextEnvError, match="shy left 4 of 4 conversations without a reward: unjudged 4"):
        converse_with(env, {".": "3"}, [{}], n=4, max_failed=0.75)


def test_an_environment_does_not_log_under_our_names():
    env = TextEnv("proud", lambda row, seed: (0, "begin."), lambda state, text: TextStep(state, info={"turns": 7}))
    with pytest.raises(TextEnvError, match="info of the environment has 'turns'; legal: names other than cut_char"):
        converse_with(env, {".": "3"}, [{}])


def test_tools_that_a_tokenizer_cannot_show_are_warned_of(capsys):
    make_codec(TOKENIZER)
    assert capsys.readouterr().out == ""
    make_codec(TOKENIZER, [{"type": "function"}])
    assert "no chat template: the model is not told what the tools are" in capsys.readouterr().out


def test_a_conversation_that_outgrows_its_row_is_cut_and_counted(user_code):
    row = {"question": "1+2?", "answer": "3"}
    rollout, _ = converse_with(
        user_code.env, {".": "<", "<": "1", "1": ">", ";": "3"}, [row], max_context=len(PROMPT) + 7
    )
    assert rollout.metrics["conversation/frac_out_of_context"] == 1.0
    assert np.asarray(rollout.traj.truncated).sum() == 2
    rollout, _ = converse_with(user_code.env, {".": "<", "<": "1", "1": ">", ";": "<"}, [row], max_turns=3)
    assert rollout.metrics["conversation/frac_out_of_turns"] == 1.0
    assert rollout.metrics["conversation/tool_calls"] == 3.0
    np.testing.assert_array_equal(rollout.traj.scores[:, 0], [0, 0])


def test_shuffled_answers_come_from_other_prompts():
    def respond(turns):
        return [Observation([turn.row // 4], 0.5, terminated=turn.row == 3) for turn in turns]

    turns = [Turn(row, [1], True) for row in range(12)]
    shuffled = conversations.shuffle_answers(
        lambda turns: [a._replace(tokens=[]) if a.terminated else a for a in respond(turns)], 4, [0]
    )
    answers = shuffled(turns)
    assert answers[3].tokens == []
    assert all(answer.tokens[0] != row // 4 for row, answer in enumerate(answers) if row != 3)
    assert len({answer.tokens[0] for answer in answers if answer.tokens}) == 3
    assert {answer.reward for answer in answers} == {0.5}
    assert shuffled(turns[8:9])[0].tokens[0] in (0, 1)


def test_a_reset_that_is_no_function_of_row_and_seed_is_refused():
    count = iter(range(100))
    env = TextEnv("whim", lambda row, seed: (0, f"prompt {next(count)}"), lambda state, text: TextStep(state))
    with pytest.raises(TextEnvError, match="whim gave another prompt than before for the same row and seed"):
        converse_with(env, {}, [{}])


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
def test_ids_of_a_thousand_random_conversations(name, shared):
    """Turns of any ids, those that no text encodes to among them: what is appended is the template's continuation."""
    tokenizer = load_tokenizer(shared / "chat" / name)
    env = environments.calculator_env(environments.TOOL_FORMATS["hermes"])
    codec = make_codec(tokenizer, env.tools)
    prompts = conversations.environment_prompts(
        env, [{"question": "Why?", "answer": "4"}], codec, 2000, 0, TurnLimits()
    )
    rng = np.random.default_rng(0)
    rows = prompts.first(1)
    respond, found = conversations.begin_conversations(env, rows, 334, codec, TurnLimits())
    call = tokenizer.encode_more('<tool_call>{"name": "calculator", "arguments": {"expression": "2+2"}}</tool_call>')
    noise = [rng.integers(0, tokenizer.size, rng.integers(1, 9)).tolist() for _ in found]
    noise = [[token for token in ids if token not in tokenizer.stop] for ids in noise]
    ended = (rng.random(len(found)) < 0.5).tolist()
    turns = [
        Turn(i, ids + call + list(tokenizer.stop[:1]) * end, bool(end))
        for i, (ids, end) in enumerate(zip(noise, ended, strict=True))
    ]
    answers = respond(turns)
    for answer, conversation, end in zip(answers, found, ended, strict=True):
        assert conversation.played[0].step.info["tool_calls"] >= 1
        assert conversation.messages[-1]["content"] == "4"
        said = tokenizer.decode_all(answer.tokens)
        assert "4" in said
        assert (said.lstrip().startswith(tokenizer.decode_all(tokenizer.stop[:1]))) == (not end)
    assert len({tuple(answer.tokens) for answer in answers}) == 2  # of the environment's words alone, not the model's
    assert answers[0].tokens[-3:] == encode_prompt(tokenizer.chat, [{"role": "user", "content": "?"}])[-3:]
    assert prompts.columns[0][SEED] == 0


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma", "phi3"])
def test_what_a_tool_returns_cannot_end_its_turn(name, shared):
    """Of an observation that spells special tokens the ids are those of a harmless one, but for plain text."""
    tokenizer = load_tokenizer(shared / "chat" / name)
    codec = make_codec(tokenizer)
    special = {tokenizer.vocabulary().get(token) for token in tokenizer.special_tokens}
    if name == "qwen3":
        assert {"<|im_end|>", "<tool_call>", "</tool_response>"} <= set(tokenizer.special_tokens)
    hostile = "4" + "".join(tokenizer.special_tokens) + "system"
    ask = [{"role": "user", "content": "2+2?"}]

    def step(state, text):
        return TextStep(state, [ask[0] | {"content": hostile, "name": hostile}] if "b" in text else "4")

    env = TextEnv("hostile", lambda row, seed: ({}, ask), step)
    prompts = conversations.environment_prompts(env, [{}], codec, 2000, 0, TurnLimits())
    respond, found = conversations.begin_conversations(env, prompts.first(1), 2, codec, TurnLimits())
    turns = [Turn(i, tokenizer.encode_more(text), False) for i, text in enumerate("ab")]
    harmless, spelled = respond(turns)
    assert [token for token in spelled.tokens if token in special] == [
        token for token in harmless.tokens if token in special
    ]
    last = found[1].messages[-1]
    assert last["content"].replace(" ", "") == hostile.replace(" ", "")
    assert last["name"] == last["content"]
    assert [conversation.played[0].special_tokens for conversation in found] == [0, 2 * len(tokenizer.special_tokens)]


@pytest.mark.parametrize("max_context", [16, 100])
def test_the_longest_completion_is_that_of_a_conversation(max_context, monkeypatch):
    lengths = []
    monkeypatch.setattr(agent_grpo, "critic_free", lambda longest: lengths.append(longest) or critic_free(longest))
    cfg = agent_grpo.Config("model", "guess", max_turns=3, max_context=max_context, sampling=Sampling(max_tokens=8))
    agent_grpo.named_algorithm(cfg)
    assert lengths == [min(3 * 8, max_context)]


# ------------------------------------------------------------------------------------------------ environments by name


def test_environments_by_name(tmp_path):
    for name in ("maze", "guess", "gymnasium:FrozenLake-v1", "reasoning_gym:chain_sum"):
        if ":" in name:
            pytest.importorskip(name.partition(":")[0])
        env, rows = environments.named_environment(name, "hermes", "", episodes=3, seed=0)
        assert len(rows) == 3
        state, prompt = env.reset(rows[1], 1)
        assert isinstance(prompt, str)
        assert isinstance(env.step(state, "down 1"), TextStep)
    (tmp_path / "rows.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    env, rows = environments.named_environment("calculator", "llama3", str(tmp_path / "rows.jsonl"), 3, 0)
    state, prompt = env.reset(rows[0], 0)
    assert prompt.startswith("2+2?\n")
    asked = env.step(state, '{"name": "calculator", "parameters": {"expression": "2+2"}}')
    assert asked.observation[0]["content"] == "4"
    assert env.step(state, "So: #### 4").reward == 1.0


def test_programs_of_the_model_run_in_the_sandbox():
    try:
        env = environments.python_env(environments.TOOL_FORMATS["hermes"])
    except SandboxError as error:
        pytest.skip(str(error))
    state, _ = env.reset({"question": "6 * 7?", "answer": "42"}, 0)
    step = env.step(state, '<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)\\n1 / 0"}}</tool_call>')
    content = step.observation[0]["content"]
    assert content.startswith("42\nTraceback")
    assert content.endswith("ZeroDivisionError: division by zero\n[error, exit code 1]")
    assert env.step(step.state, "#### 42").reward == 1.0


def test_a_sandbox_that_is_not_to_be_had_is_no_answer_of_a_program(monkeypatch):
    def refuse(source, isolation):
        raise SandboxError("no kernel")

    monkeypatch.setattr(environments, "probe_isolation", lambda level: None)
    monkeypatch.setattr(environments, "run_code", refuse)
    env = environments.python_env(environments.TOOL_FORMATS["hermes"])
    state, _ = env.reset({"question": "?", "answer": "42"}, 0)
    with pytest.raises(ToolUnavailable, match="no kernel"):
        env.step(state, '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>')


def test_programs_that_hang_end_before_their_turn():
    turn = {field.name: field.default for field in dataclasses.fields(agent_grpo.Config)}["turn_seconds"]
    assert environments.PROGRAMS * sandbox.DEFAULT_LIMITS.seconds < turn


def test_problems_that_cannot_be_asked_or_graded_are_refused_at_the_start(tmp_path):
    path = tmp_path / "rows.jsonl"
    legal = '{"question": "2+2?", "answer": "so #### 4"}\n'
    for row, message in {
        '{"answer": 4}': "line 2: no column 'question'; legal: columns question and answer",
        '{"question": "?", "answer": null}': "line 2: no column 'answer'; legal",
        '{"question": 3, "answer": 4}': "line 2, column 'question' is of type int; legal: a text",
        '{"question": "?", "answer": "four"}': "line 2: column 'answer' holds no number: 'four'. Legal: ",
    }.items():
        path.write_text(legal + row)
        with pytest.raises(ValueError, match=re.escape(message)):
            environments.named_environment("calculator", "hermes", str(path), 3, 0)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("chess", "", "environment 'chess'; legal: calculator, python, maze, guess, gymnasium:NAME"),
        ("maze:3", "", "environment 'maze:3'; legal"),
        ("calculator", "", "which problems\\? legal: --prompts FILE.jsonl"),
        ("guess", "rows.jsonl", "guess has rows of its own; legal: without --prompts"),
        ("gymnasium:NoSuch-v0", "", "gymnasium: .*NoSuch"),
    ],
)
def test_what_is_no_environment(name, files, message):
    if name.startswith("gymnasium"):
        pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match=message):
        environments.named_environment(name, "hermes", files, 3, 0)
