"""agent_grpo.py and the arithmetic agent: steps over conversations, what they leave, what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import agent_grpo, arithmetic_agent_grpo
from experiments.common import tool_arithmetic
from experiments.common.environments import NamedEnvironment
from experiments.common.settings import Batches, MeshShape, Sampling
from models import tiny
from rljax.data.demonstrations import collate
from rljax.envs.text import TextEnv, TextEnvError, TextStep
from rljax.models import policy
from test_grpo_experiment import RAW, metrics, write_tokenizer


def step(state, text):
    """A letter a turn: the conversation ends where the model writes an a; each of its letters is worth a little."""
    return TextStep(state, "go on ", reward=len(set(text)) / 10, terminated="a" in text, info={"letters": len(text)})


SPELL = NamedEnvironment(
    TextEnv("spell", lambda row, seed: (0, row["word"]), step), [{"word": w} for w in ["spell", "it", "out", "loud"]]
)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> agent_grpo.Config:
    root = tmp_path_factory.mktemp("agent")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    return agent_grpo.Config(
        model=str(root / "model"),
        environment="spell",
        max_turns=3,
        max_context=48,
        credit="turn",
        seed=1,
        steps=2,
        batches=Batches(prompts=2, num_generations=2),
        sampling=Sampling(max_tokens=6),
        eval_prompts=2,  # with one there is no standard error
        eval_samples=4,
        save_every=1,
        directory=str(root / "run"),
        mesh=MeshShape(fsdp=1, tensor=-1),
    )


@pytest.fixture(scope="module")
def finished(tiny_run):
    """(its settings, what it returned)"""
    return tiny_run, agent_grpo.main(tiny_run, environment=SPELL)


def test_a_run_leaves_transcripts(finished):
    cfg, result = finished
    directory = Path(cfg.directory)
    first, last = metrics(directory)
    assert (first["step"], last["step"]) == (0, 1)
    assert 1 <= last["conversation/turns"] <= 3
    assert last["conversation/letters"] > 0
    assert last["reward"] == pytest.approx(last["reward/environment"])
    assert last["grad_norm"] > 0
    assert first["sampler_gap"] < 1e-3
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-5)
    records = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    several = [record for record in records if "turns" in record]
    assert several
    for record in several:
        assert {turn["text"] for turn in record["turns"] if not turn["policy"]} == {"go on "}
        rewards = [turn["reward"] for turn in record["turns"] if turn["policy"]]
        assert sum(rewards) == pytest.approx(record["reward"], abs=1e-3)
        said = [turn for turn in record["turns"] if turn["policy"] and turn["text"] != "</s>"]
        assert all(turn["notes"].startswith("letters ") for turn in said)
    assert (directory / "model" / "config.json").is_file()


@pytest.mark.nightly
def test_stopped_and_run_again_it_ends_the_same(finished):
    cfg, result = finished
    before = metrics(cfg.directory)
    shutil.rmtree(Path(cfg.directory) / "checkpoints" / "2")
    (Path(cfg.directory) / "checkpoints" / "2.sha256.json").unlink()
    assert agent_grpo.main(cfg, environment=SPELL) == result
    assert metrics(cfg.directory) == before


def test_an_environment_that_fails_too_often_ends_the_run(tiny_run, tmp_path):
    def broken(state, text):
        raise ConnectionError("no server")

    cfg = dataclasses.replace(tiny_run, directory=str(tmp_path / "run"))
    failing = SPELL._replace(env=SPELL.env._replace(step=broken))
    said = "spell left 4 of 4 conversations without a reward: raised 4; the first: ConnectionError: no server"
    with pytest.raises(TextEnvError, match=said):
        agent_grpo.main(cfg, environment=failing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"environment": "chess"}, "environment 'chess'; legal: calculator, python, maze"),
        ({"batches": Batches(prompts=2, num_generations=2, oversample=2)}, "oversample = 2, .*legal: 1"),
        ({"algorithm": "gdpo", "credit": "turn"}, "gdpo does not compare .*legal: --credit trajectory"),
        ({"max_context": 6}, "legal: a sum of at most 6"),
        ({"max_context": 4096}, "max_context = 4096; legal: at most 64, the model's context"),
    ],
)
def test_what_it_refuses(tiny_run, tmp_path, wrong, message):
    environment = None if "environment" in wrong else SPELL
    cfg = dataclasses.replace(tiny_run, directory=str(tmp_path / "run"), **wrong)
    with pytest.raises(ValueError, match=message):
        agent_grpo.main(cfg, environment=environment)


# ----------------------------------------------------------------------------------------------- the arithmetic agent


def test_demonstrations_teach_calls_and_answers_not_what_the_calculator_says():
    task = tool_arithmetic.make_tool_task(2, seed=0, width=16, layers=1)
    row = {"prompt": "347*58=", "answer": "20126"}
    with_tool, alone = tool_arithmetic.demonstrations_of_tools(task, [row, row], np.array([True, False]))
    traj = collate([with_tool, alone], tool_arithmetic.MAX_CONTEXT)
    learned = [task.tokenizer.decode(np.asarray(traj.actions)[b][np.asarray(traj.mask)[b]].tolist()) for b in range(2)]
    assert learned == ["<calc(347*58)>20126", "20126"]
    turn = f"<calc({row['prompt'][:-1]})>"
    step = task.env.step(task.env.reset(row, 0)[0], turn)
    said = task.tokenizer.decode(with_tool.completion)
    assert said == turn + step.observation[0]["content"] + row["answer"]
    assert task.env.step(step.state, row["answer"]).reward == 1.0
    assert task.env.step(step.state, "20127").reward == 0.0


def test_the_longest_problem_fits_the_context():
    call, answer = len("<calc(999*99)>") + 1, len("98901")
    assert len("999*99=") + call + len("98901=") + answer + 1 <= tool_arithmetic.MAX_CONTEXT
    assert call <= tool_arithmetic.TURN_TOKENS


def test_training_and_evaluation_share_no_problem():
    task = tool_arithmetic.make_tool_task(64, seed=3, width=16, layers=1)
    train, evaluation = ({row["prompt"] for row in side.columns} for side in (task.train_prompts, task.eval_prompts))
    assert (len(train), len(evaluation)) == (16384, 64)
    assert not train & evaluation
    for row in task.eval_prompts.columns:
        a, b = row["prompt"].removesuffix("=").split("*")
        assert int(a) * int(b) == int(row["answer"])


@pytest.mark.nightly
def test_the_arithmetic_agent_cuts_as_it_is_told(tmp_path, monkeypatch, capsys):
    task = tool_arithmetic.make_tool_task(8, seed=0, width=16, layers=1)
    params = policy.init(task.config, jax.random.key(0))
    monkeypatch.setattr(arithmetic_agent_grpo, "warmed_up", lambda cfg: (task, params))
    nothing = {"reward": 0.0, "error": 0.0, "tool_calls": 0.0}
    monkeypatch.setattr(tool_arithmetic, "mean_reward", lambda *_: nothing)
    rows = []  # that are annotated at a time

    def make_annotate(model, needs, make=policy.make_annotate):
        annotate = make(model, needs)
        return lambda state, traj: rows.append(len(traj.mask)) or annotate(state, traj)

    monkeypatch.setattr(policy, "make_annotate", make_annotate)
    batches = Batches(prompts=4, num_generations=4, micro_batches=2)
    cfg = arithmetic_agent_grpo.Config(steps=1, batches=batches, eval_prompts=8, directory=str(tmp_path / "run"))
    arithmetic_agent_grpo.main(cfg)
    assert "an update is cut into 2 micro-batches" in capsys.readouterr().out
    assert rows == [8, 8]


@pytest.mark.nightly
@pytest.mark.parametrize("shuffled", [False, True])
def test_it_learns_to_call_the_calculator(tmp_path, shuffled):
    """Four standard errors and more; from the calculator's answers to other problems it learns nothing of the kind."""
    cfg = arithmetic_agent_grpo.Config(seed=7, steps=20, shuffle_observations=shuffled, directory=str(tmp_path))
    reached = arithmetic_agent_grpo.main(cfg)
    error = np.hypot(reached["before"]["error"], reached["after"]["error"])
    rise = (reached["after"]["reward"] - reached["before"]["reward"]) / error
    assert (rise < 4) if shuffled else (rise > 4)
