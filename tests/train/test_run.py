"""A run directory: resumed to the last bit, locked, refused unharmed, stopped by a signal, never trained on NaN."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.train import distributed, inputs
from rljax.train.checkpoint import Checkpoints
from rljax.train.log import MACHINE_METRICS
from rljax.train.run import Run
from rljax.train.update import make_update
from rljax.types import Batch, Objective, PromptBatch, TrainState, trajectory_of_tokens

OPTIMIZER = optax.adam(0.1)
CONFIG = {"seed": 0, "sizes": (1, 2), "nested": {"rate": 0.1}}
STEPS = 7


def noisy_squares(params, frozen, batch):
    error = batch["x"] @ params["w"] - 1.0 + batch["noise"]
    return (error**2).sum(), {"error": (error.sum(), error.size)}


def prepare(params, frozen, batch, key, map_rows):
    return batch | {"noise": 0.1 * jax.random.normal(key, (4,))}


UPDATE = make_update(Objective(prepare, noisy_squares), OPTIMIZER)


def train(directory, after_step=lambda step: None, config=CONFIG, **options):
    """A loop as an experiment's: data by cursor, noise by key. Returns the last state."""
    params = {"w": jnp.zeros(3)}
    state = TrainState(step=0, params=params, opt_state=OPTIMIZER.init(params), key=jax.random.key(5))
    with Run(directory, config, steps=STEPS, save_every=2, **options) as run:
        state = run.restore(state)
        for step in run.steps(state.step):
            x = np.random.default_rng(int(state.cursor)).normal(size=(4, 3))
            state, metrics = UPDATE(state, {"x": jnp.float32(x)})
            state = state.replace(step=step + 1, cursor=state.cursor + 4)
            after_step(step)
            run.record(step, state, metrics | {"tokens": 12})
    return state


def files(directory):
    found = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def log(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(MACHINE_METRICS)} for line in lines]


def same(one, other):
    jax.tree.map(
        lambda x, y: (
            np.testing.assert_array_equal(*(np.asarray(jax.random.key_data(z)) for z in (x, y)))
            if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
            else np.testing.assert_array_equal(x, y)
        ),
        one,
        other,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return train(directory), log(directory)


def test_a_run_logs_every_step_and_saves_the_last(tmp_path):
    state = train(tmp_path)
    assert state.step == STEPS
    assert [line["step"] for line in log(tmp_path)] == list(range(STEPS))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["6", "7"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second"] == pytest.approx(12 / last["seconds"])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_run_again_the_result_is_the_same_to_the_last_bit(tmp_path, uninterrupted, at, number):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, lambda step: os.kill(os.getpid(), number) if step == at else None)
    assert stop.value.code == 128 + number
    assert len(log(tmp_path)) == at + 1  # that step was finished
    state = train(tmp_path)
    same(state, uninterrupted[0])
    assert log(tmp_path) == uninterrupted[1]


def test_killed_between_two_checkpoints_what_was_logged_since_is_done_again(tmp_path, uninterrupted):
    """The crash leaves metrics of a step that no checkpoint knows, and half a line."""

    def crash(step):
        if step == 5:
            raise ConnectionError("the machine is gone")

    with pytest.raises(ConnectionError):
        train(tmp_path, crash)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 2, 3, 4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    steps = []
    state = train(tmp_path, steps.append)
    assert steps == [4, 5, 6]
    same(state, uninterrupted[0])
    assert log(tmp_path) == uninterrupted[1]


def test_a_finished_run_run_again_does_nothing(tmp_path, uninterrupted):
    train(tmp_path)
    before, steps = log(tmp_path), []
    state = train(tmp_path, steps.append)
    assert steps == []
    assert log(tmp_path) == before
    same(state, uninterrupted[0])


def test_where_arrays_lie_may_change_and_nothing_else(tmp_path):
    """The mesh, say: a resumed run may have another one. A setting beside it may not."""

    class Stopped(Exception):
        pass

    def stop_at_3(step):
        if step == 3:
            raise Stopped

    options = {"placement": ("mesh", "micro_batches")}
    first = CONFIG | {"mesh": {"fsdp": 8}, "batches": {"micro_batches": 1, "prompts": 4}}
    with pytest.raises(Stopped):
        train(tmp_path, stop_at_3, first, **options)
    with pytest.raises(ValueError, match=r"other settings: batches.prompts = 4, now 5\."):
        train(tmp_path, config=first | {"mesh": {"fsdp": 4}, "batches": {"micro_batches": 2, "prompts": 5}}, **options)
    steps = []
    moved = first | {"mesh": {"fsdp": 2, "tensor": 4}, "batches": {"micro_batches": 2, "prompts": 4}}
    train(tmp_path, steps.append, moved, **options)
    assert steps == [2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["mesh"] == {"fsdp": 8}


def test_where_and_how_patiently_others_are_asked_may_change_and_one_line_says_so(tmp_path, capsys):
    """An address may be another one, but not come or go."""

    def stop_at_3(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"logistics": ("save_every", "server.url")}
    first = CONFIG | {"save_every": 2, "server": {"url": "http://one/v1", "max_gap": 1}, "judge": {"url": ""}}
    with pytest.raises(SystemExit):
        train(tmp_path, stop_at_3, first, **options)
    assert "save_every" not in capsys.readouterr().out
    for name, other, message in (
        ("server", {"url": "http://two/v1", "max_gap": 2}, r"other settings: server.max_gap = 1, now 2\."),
        ("server", {"url": "", "max_gap": 1}, r"other settings: server.url = 'http://one/v1', now ''\."),
        ("judge", {"url": "http://one/v1"}, r"other settings: judge.url = '', now 'http://one/v1'\."),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, config=first | {name: other}, **options)
    steps = []
    moved = first | {"save_every": 5, "server": {"url": "http://two/v1", "max_gap": 1}}
    train(tmp_path, steps.append, moved, **options)
    assert steps == [4, 5, 6]
    said = " ".join(capsys.readouterr().out.split())
    changes = "save_every = 2, now 5; server.url = 'http://one/v1', now 'http://two/v1'"
    assert f"from step 4 on: {changes}; what is learned does not depend on it" in said


def test_other_settings_are_refused_by_name_and_the_directory_is_left_as_it_was(tmp_path):
    train(tmp_path)
    before = files(tmp_path)
    other = CONFIG | {"seed": 1, "new": True}
    with pytest.raises(ValueError, match="other settings: new = None, now True; seed = 0, now 1"):
        train(tmp_path, config=other)
    assert files(tmp_path) == before


def test_a_finished_run_of_other_steps_says_how_its_weights_are_trained_on(tmp_path):
    finished = CONFIG | {"steps": 7, "model": "story"}
    longer = finished | {"steps": 9}
    train(tmp_path, config=finished)
    with pytest.raises(ValueError, match=r"steps = 7, now 9\. .* --directory$"):
        train(tmp_path, config=longer)
    (tmp_path / "model").mkdir()  # which an experiment writes at its end
    with pytest.raises(ValueError, match=rf"steps = 7, now 9\. .* --model {re.escape(str(tmp_path))}/model "):
        train(tmp_path, config=longer)
    with pytest.raises(ValueError, match=r"seed = 0, now 1\. .* --directory$"):
        train(tmp_path, config=finished | {"seed": 1})


def test_a_finished_run_says_that_another_function_is_only_evaluated_with(tmp_path, capsys):
    train(tmp_path, functions={"reward": first_reward})
    train(tmp_path, functions={"reward": second_reward})
    assert "no step is left to train with it, but evaluations use it" in capsys.readouterr().out


def test_process_0_alone_looks_for_other_settings(tmp_path, monkeypatch):
    """Where NFS is asked for a file that is not there yet, it may say so for half a minute after it was written."""
    train(tmp_path)
    monkeypatch.setattr(distributed, "on_main", lambda name, call: "")
    Run(tmp_path, CONFIG | {"seed": 1}, steps=STEPS)
    monkeypatch.setattr(distributed, "on_main", lambda name, call: "process 0 refuses it")
    with pytest.raises(ValueError, match="process 0 refuses it"):
        Run(tmp_path / "absent", CONFIG, steps=STEPS)


@pytest.mark.parametrize("seconds", [30.0, 0.0])
def test_other_processes_wait_until_they_see_the_directory(seconds, tmp_path, monkeypatch):
    def make():
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")

    main = threading.Timer(0.3, make)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "on_main", lambda name, call: main.start() if "open" in name else "")
    monkeypatch.setattr("rljax.train.run.SHARED_SECONDS", seconds)
    run = Run(tmp_path / "run", CONFIG, steps=STEPS)
    if seconds:
        with run:
            assert not main.is_alive()
    else:
        with pytest.raises(ValueError, match="process 0 made it; legal: a directory that all processes see"), run:
            pass
    main.join()


def test_a_run_whose_files_have_changed_is_refused_and_left_as_it_was(tmp_path):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    model.mkdir()
    rows.write_text("first")
    (model / "model.safetensors").write_text("weights")
    train(tmp_path / "run", inputs=[rows, model])
    before = files(tmp_path / "run")
    train(tmp_path / "run", inputs=[rows, model])
    rows.write_text("other")
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since .*run was begun: name another --directory"):
        train(tmp_path / "run", inputs=[rows, model])
    rows.write_text("first")
    (model / "model.safetensors").unlink()
    (model / "model-1.safetensors").write_text("weights")
    with pytest.raises(ValueError, match=r"model-1\.safetensors has changed .* \(and 1 more files\)"):
        train(tmp_path / "run", inputs=[rows, model])
    assert files(tmp_path / "run").items() >= before.items() - {("report.html", before["report.html"])}
    (tmp_path / "run" / "inputs.json").unlink()  # as an earlier version left it
    train(tmp_path / "run", inputs=[rows, model])
    assert not (tmp_path / "run" / "inputs.json").exists()


def test_what_is_read_of_a_large_file_of_a_model(tmp_path, monkeypatch):
    """Blocks from the first byte to the last; rows are read whole."""
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 4)
    monkeypatch.setattr(inputs, "BLOCKS", 3)

    def digest(content, name="model.safetensors"):
        (tmp_path / name).write_bytes(content)
        return inputs.file_digests([tmp_path] if name.endswith("safetensors") else [tmp_path / name])

    same = digest(bytes(20))
    assert same.keys() == {str(tmp_path / "model.safetensors")}
    read = [digest(bytes(i) + b"x" + bytes(19 - i)) != same for i in range(20)]
    assert [i for i in range(20) if read[i]] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert digest(bytes(21)) != same  # nothing but the length
    assert all(digest(bytes(i) + b"x" + bytes(11 - i)) != digest(bytes(12)) for i in range(12))
    whole = digest(bytes(20), "rows.jsonl")
    assert all(digest(bytes(i) + b"x" + bytes(19 - i), "rows.jsonl") != whole for i in range(20))


def first_reward(completion):
    return 1.0


def second_reward(completion):
    return 2.0


def test_a_run_resumed_with_another_function_warns_and_keeps_both_sources(tmp_path, uninterrupted, capsys):
    def stop_at_three(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(tmp_path, stop_at_three, functions={"reward": first_reward})
    assert "warning" not in capsys.readouterr().out
    state = train(tmp_path, functions={"reward": second_reward})
    assert "warning: from step 4 on this run uses another source than before in reward.py" in capsys.readouterr().out
    assert "return 1.0" in (tmp_path / "functions" / "step_0" / "reward.py").read_text()
    assert "return 2.0" in (tmp_path / "functions" / "step_4" / "reward.py").read_text()
    assert (tmp_path / "functions" / "step_0" / "git_revision.txt").is_file()
    same(state, uninterrupted[0])


def test_a_run_resumed_with_the_same_functions_says_nothing_of_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(
            tmp_path,
            lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None,
            functions={"reward": first_reward},
        )
    train(tmp_path, functions={"reward": first_reward})
    assert "warning" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "functions").iterdir()] == ["step_0"]


def test_a_directory_in_use_is_refused_and_left_as_it_was(tmp_path):
    train(tmp_path)
    before = files(tmp_path)
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another process is running in this directory"):
            train(tmp_path)
        holder.communicate("\n")
    assert files(tmp_path) == before
    train(tmp_path)  # and it is free again


def record_all(directory, *metrics):
    state = TrainState(step=0, params={"w": jnp.zeros(1)}, opt_state=(), key=jax.random.key(0))
    with Run(directory, {}, steps=len(metrics), save_every=1) as run:
        for step in run.steps(run.restore(state).step):
            run.record(step, state.replace(step=step + 1), metrics[step])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"loss": np.nan}, "loss not finite"),
        ({"loss": 1.0, "grad_norm": np.inf}, "grad_norm not finite"),
        ({"loss": 1.0, "grad_norm": 1.0, "update_norm": np.nan}, "update_norm not finite"),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_and_is_neither_logged_nor_saved(tmp_path, bad, words):
    with pytest.raises(FloatingPointError, match=f"{words} at step 1; the last checkpoint is step 1"):
        record_all(tmp_path, {"loss": 1.0}, bad, {"loss": 1.0})
    assert [line["step"] for line in log(tmp_path)] == [0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["1"]
    with pytest.raises(FloatingPointError, match=f"{words} at step 0; there is no checkpoint"):
        record_all(tmp_path / "at the start", bad)


def test_another_metric_that_is_not_finite_is_null_in_the_log(tmp_path):
    record_all(tmp_path, {"loss": 1.0, "kl": np.nan})
    assert log(tmp_path) == [{"step": 0, "loss": 1.0, "kl": None}]


def test_what_is_measured_after_the_last_step_stands_in_its_line_and_costs_no_step_where_it_fails(tmp_path):
    def finish(measure):
        state = TrainState(step=0, params={"w": jnp.zeros(1)}, opt_state=(), key=jax.random.key(0))
        with Run(tmp_path, {}, steps=2) as run:
            state = run.restore(state)
            for step in run.steps(state.step):
                state = state.replace(step=step + 1)
                run.record(step, state, {"loss": float(step)})
            run.add_metrics({"eval_reward": measure(int(state.step))})

    def gone(step):
        raise ConnectionError("the judge is gone")

    with pytest.raises(ConnectionError):
        finish(gone)
    assert log(tmp_path) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0}]
    for value in (0.5, 0.25):  # the second time it is a finished run
        finish(lambda step, value=value: value * step)
        assert log(tmp_path) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0, "eval_reward": 1.0}]
        assert "seconds" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_all_is_closed_where_the_last_save_fails(tmp_path, monkeypatch):
    def full(self):
        close(self)
        raise OSError("disk full")

    close = Checkpoints.close
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "close", full)
        with pytest.raises(OSError, match="disk full"):
            train(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert signal.getsignal(signal.SIGTERM) is handler
    train(tmp_path)  # nothing holds its lock


def test_a_second_ctrl_c_stops_at_once_and_the_handlers_come_back(tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def press_twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, press_twice)
    assert log(tmp_path) == []
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_directory_says_what_was_run(tmp_path):
    source = tmp_path / "script.py"
    source.write_text("print('an experiment')")
    train(tmp_path / "run", source=str(source))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["config"] == {"seed": 0, "sizes": [1, 2], "nested": {"rate": 0.1}}
    assert about["experiment"] == "script"
    assert about["devices"] == 8
    assert (tmp_path / "run" / "experiment.py").read_text() == source.read_text()


def test_samples_bring_no_more_to_the_host_than_they_show(tmp_path, monkeypatch):
    """The first four of five prompts, without what no sample has; their time is logged beside the step's."""
    fetched = []

    def fetch(tree):
        fetched.extend(np.shape(x) for x in jax.tree.leaves(tree))
        return jax.device_get(tree)

    rows = jnp.arange(10)
    tokens = jnp.stack([jnp.full(10, 20), rows], axis=1)
    group = rows % 5 + 7
    traj = trajectory_of_tokens(tokens, jnp.ones((10, 2), int), jnp.array([[False, True]] * 10), jnp.zeros((10, 2)))
    traj = traj.replace(group=group, support=jnp.zeros((10, 1, 6), int), dist=jnp.zeros((10, 1, 6)))
    prompts = PromptBatch(np.zeros((5, 1)), np.ones((5, 1)), np.arange(7, 12), [{"n": n} for n in range(5)], 5)
    state = TrainState(step=0, params={}, opt_state=None, key=jax.random.key(5))
    with Run(tmp_path, {}, steps=1) as run:
        state = run.restore(state)
        for step in run.steps(0):
            monkeypatch.setattr(distributed, "fetch", fetch)
            batch = Batch(traj, jnp.zeros((10, 1)), traj.mask, coefficients={"kl": jnp.zeros(())})
            notes = [[str(row)] for row in range(10)]
            shown = (lambda ids: "".join(map(chr, ids)), (), prompts, {"entropy": rows[:, None]}, notes)
            run.log_samples(step, batch, *shown)
            run.record(step, state.replace(step=1), {})
    assert fetched[0] == (10,)
    assert set(fetched[1:]) <= {(8,), (8, 1)}
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    found = [(r["group"], r["columns"]["n"], ord(r["completion"]), r["tokens"]["entropy"][1]) for r in records]
    assert found == [(7 + n, str(n), n + b, n + b) for n in range(4) for b in (0, 5)]
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["samples_seconds"] > 0


class Doubler:
    names = ("double",)

    def __call__(self, x):
        return 2 * x


def test_timed_functions_are_logged_and_stay_what_they_are(tmp_path):
    state = TrainState(step=0, params={}, opt_state=None, key=jax.random.key(5))
    with Run(tmp_path, {}, steps=3) as run:
        double, plus, evaluate = run.timed(double=Doubler(), plus=lambda x, by: x + by, eval=time.sleep)
        assert double.names == ("double",)
        state = run.restore(state)
        for step in run.steps(0):
            assert double(double(jnp.ones(2))).tolist() == [4.0, 4.0]
            if step == 1:
                assert plus(1, by=2) == 3
                evaluate(0.02)
                with run.not_counted():
                    time.sleep(0.5)
            run.record(step, state.replace(step=step + 1), {"tokens": 6})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["double_seconds"] < line["seconds"] for line in lines)
    assert ["plus_seconds" in line for line in lines] == [False, True, False]
    evaluating = lines[1]["eval_seconds"]
    assert 0.02 <= evaluating < lines[1]["seconds"] < 0.5
    assert lines[1]["tokens_per_second"] == pytest.approx(6 / (lines[1]["seconds"] - evaluating))
    assert all(line["compile_seconds"] >= 0 and line["peak_host_bytes"] > 0 for line in lines)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["backend"] == "cpu"
