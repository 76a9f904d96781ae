"""Exported samples hold what samples.jsonl holds, by the packages' own readers where they are installed.

pip install -e '.[viewers]' && python -m pytest tests/test_export_samples.py     # harbor needs Python 3.12
"""

import json

import numpy as np
import pytest

from experiments.tools import export_samples
from experiments.tools.export_samples import Config
from rljax.train.samples import sample_records
from rljax.types import Batch, trajectory_of_tokens

LETTERS = "-abcdefghijklmnopqrstuvwxyz"


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


@pytest.fixture
def run(tmp_path):
    """Two completions of one prompt, the second a conversation, and one of another without a reward, at two steps."""
    tokens = np.array([[1, 2, 4, 5, 6, 0], [1, 2, 7, 8, 9, 10], [3, 11, 0, 0, 0, 0]])
    segments = (tokens > 0).astype(int)
    chosen = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0]], bool)
    last = chosen & (np.cumsum(chosen[:, ::-1], axis=1)[:, ::-1] == 1)
    reward = np.array([1.0, 0.25, np.nan])
    traj = trajectory_of_tokens(
        tokens,
        segments,
        chosen,
        np.where(chosen, -np.arange(18).reshape(3, 6) / 4, 0).astype(np.float32),
        rewards=np.where(last, reward[:, None], 0.0).astype(np.float32),
        terminated=last & np.array([[True], [False], [True]]),
        truncated=last & np.array([[False], [True], [False]]),
        group=np.array([5, 5, 9]),
        scores=np.array([[1.0], [0.25], [np.nan]], np.float32),
    )
    batch = Batch(traj=traj, advantages=np.zeros(traj.mask.shape, np.float32), mask=traj.mask)
    columns = [{"answer": "42"}, {"answer": "42"}, {"answer": "7"}]
    records = [
        record
        for step in (0, 20)
        for record in sample_records(
            step, batch, decode, names=("exact",), columns=columns, turn_notes=[["", "hm"]] * 3
        )
    ]
    directory = tmp_path / "my-run"
    directory.mkdir()
    (directory / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"experiment": "agent_grpo", "git": "abc", "config": {"model": "tiny"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_trajectory_has_the_ids_and_log_probs_of_each_turn(run, tmp_path):
    paths = export_samples.main(Config(str(run), "atif", str(tmp_path / "out"), steps=(20,)))
    assert [path.name for path in paths] == ["step20-group5-1.json", "step20-group5-2.json", "step20-group9-1.json"]
    document = json.loads(paths[1].read_text())
    user, first, second = document["steps"]
    assert user["message"] == "ab"
    assert first["observation"] == {"results": [{"content": "h"}]}
    assert second["metrics"]["prompt_token_ids"] == [1, 2, 7, 8]
    assert second["metrics"]["completion_token_ids"] == [9, 10]
    assert second["metrics"]["logprobs"] == [-2.5, -2.75]
    assert second["extra"] == {"reward": 0.25, "notes": "hm"}
    assert document["final_metrics"]["extra"] == {"reward": 0.25, "scores": {"exact": 0.25}, "ended": False}


def test_the_log_of_inspect_counts_what_was_scored(run, tmp_path):
    (path,) = export_samples.main(Config(str(run), "inspect", str(tmp_path / "out")))
    assert path.name == "my-run.json"
    log = json.loads(path.read_text())
    assert [(s["id"], s["epoch"]) for s in log["samples"][:3]] == [
        ("step0-group5", 1),
        ("step0-group5", 2),
        ("step0-group9", 1),
    ]
    exact, reward = log["results"]["scores"]
    assert (exact["metrics"]["mean"]["value"], exact["scored_samples"], exact["unscored_samples"]) == (0.625, 4, 2)
    assert reward["name"] == "reward"


def test_what_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"no completions in samples\.jsonl at these steps"):
        export_samples.main(Config(str(run), "atif", str(tmp_path / "out"), steps=(3,)))


def test_inspect_reads_it(run, tmp_path):
    log_reader = pytest.importorskip("inspect_ai.log")
    (path,) = export_samples.main(Config(str(run), "inspect", str(tmp_path / "out")))
    log = log_reader.read_eval_log(str(path))
    assert (log.status, log.eval.task, log.eval.model, log.eval.dataset.samples) == ("success", "agent_grpo", "tiny", 4)
    assert len(log.samples) == 6
    single, conversation, unscored = log.samples[:3]
    assert [message.role for message in single.messages] == ["user", "assistant"]
    assert (single.input, single.output.completion, single.target) == ("ab", "def", "42")
    assert single.output.stop_reason == "stop"
    assert [each.logprob for each in single.output.choices[0].logprobs.content] == [-0.5, -0.75, -1.0]
    assert [message.text for message in conversation.messages] == ["ab", "g", "h", "ij"]
    assert conversation.output.stop_reason == "max_tokens"
    assert {name: score.value for name, score in conversation.scores.items()} == {"exact": 0.25, "reward": 0.25}
    assert unscored.scores == {}
    assert log.results.scores[0].metrics["mean"].value == 0.625


def test_harbor_reads_it(run, tmp_path):
    validator = pytest.importorskip("harbor.utils.trajectory_validator")
    trajectories = pytest.importorskip("harbor.models.trajectories")
    for path in export_samples.main(Config(str(run), "atif", str(tmp_path / "out"))):
        check = validator.TrajectoryValidator()
        assert check.validate(path), check.errors
        document = json.loads(path.read_text())
        read = trajectories.Trajectory.model_validate(document)
        assert read.to_json_dict()["steps"] == document["steps"]
        assert read.final_metrics.total_completion_tokens == sum(
            len(step.metrics.completion_token_ids) for step in read.steps if step.metrics
        )


def test_a_run_outside_a_checkout_has_no_revision(run, tmp_path):
    (run / "config.json").write_text(json.dumps({"experiment": "agent_grpo", "git": None, "config": {}}))
    (path, *_) = export_samples.main(Config(str(run), "atif", str(tmp_path / "out")))
    assert json.loads(path.read_text())["agent"]["version"] == "unknown"
