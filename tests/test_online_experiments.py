"""ppo.py, online_dpo.py, distil.py and best_of_n.py on a model directory made here: runs, stops, and bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import best_of_n, distil, online_dpo, ppo
from experiments.common import models as common_models
from experiments.common import runs, train
from experiments.common.sampling import make_mix
from experiments.common.settings import Batches, Controllers, MeshShape, Optimizer, Sampling, Weights, debug_batches
from models import tiny
from rljax.data.prompts import Prompts
from rljax.models import decoder, hf
from rljax.train.mesh import make_mesh
from test_grpo_experiment import RAW, VERIFIERS, change, metrics, note_calls, write_prompts, write_tokenizer

ROWS = [
    {"prompt": "once upon"[: 3 + i], "completion": " a time"[: 2 + i], "letters": "abcdefghijklm"} for i in range(6)
]
MESH = MeshShape(fsdp=1, tensor=-1)  # few prompts, eight devices


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a model, a teacher of another depth, a reward model and prompts."""
    root = tmp_path_factory.mktemp("online")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    deeper = RAW | {"num_hidden_layers": 2}
    write_tokenizer(tiny.write(root / "teacher", deeper, tiny.tensors_of(deeper)))
    config = hf.read_config(root / "model")
    head = np.linspace(-1, 1, config.hidden_size, dtype=np.float32)
    hf.save(root / "reward", config, hf.load(root / "model", config), root / "model", score_head=head)
    write_prompts(root / "prompts.jsonl", ROWS)
    return root


def settings(script, root: Path, directory: Path, **fields):
    """Two steps of two prompts with two completions each."""
    base = dict(
        model=str(root / "model"),
        prompts=str(root / "prompts.jsonl"),
        seed=1,
        steps=2,
        batches=Batches(prompts=2, num_generations=2),
        sampling=Sampling(max_tokens=8),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=0),
        eval_prompts=2,
        eval_samples=4,
        save_every=1,
        directory=str(directory),
        mesh=MESH,
    )
    names = {field.name for field in dataclasses.fields(script.Config)}
    if "rewards" in names:
        base["rewards"] = ("share",)
    teacher = {"teacher": fields.pop("teacher")} if "teacher" in fields else {}
    return change(script.Config(**base, **teacher), **fields)


def run(script, cfg):
    judged = "rewards" in {field.name for field in dataclasses.fields(cfg)}
    return script.main(cfg, verifiers=VERIFIERS) if judged else script.main(cfg)


def ppo_settings(root, directory):
    return settings(
        ppo,
        root,
        directory,
        rewards=("share", f"{root / 'reward'}=0.5"),
        critic="separate",
        critic_model=str(root / "reward"),
        critic_learning_rate=2e-2,
        controllers=Controllers(kl_target=0.01, kl_horizon=10),
        batches__epochs=2,
        batches__minibatches=2,
        ppo=ppo.Ppo(missing_eos_penalty=0.5, clip_reward=0.9, whiten_rewards=True),
    )


SCRIPTS = {
    "ppo": (ppo, ppo_settings),
    "online_dpo": (online_dpo, lambda root, directory: settings(online_dpo, root, directory, batches__epochs=2)),
    "xpo": (online_dpo, lambda root, directory: settings(online_dpo, root, directory, method="xpo")),
    "nash_md": (online_dpo, lambda root, directory: settings(online_dpo, root, directory, method="nash_md")),
    "distil": (
        distil,
        lambda root, directory: settings(
            distil,
            root,
            directory,
            teacher=str(root / "teacher"),
            divergence="jsd",
            on_policy_fraction=0.5,
            batches__num_generations=1,
            batches__prompts=4,
        ),
    ),
}


SCRIPTS["distil of the file"] = (
    distil,
    lambda root, directory: change(SCRIPTS["distil"][1](root, directory), on_policy_fraction=0.0),
)
AT_NIGHT = {"xpo", "nash_md", "distil of the file"}  # other batches in the loops of online_dpo and distil


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in AT_NIGHT else name for name in SCRIPTS]
)
def test_stopped_and_run_again_it_ends_the_same(name, root, tmp_path, monkeypatch):
    """What a run leaves that was stopped after its first step; every number is equal to the last bit."""
    script, make = SCRIPTS[name]
    cfg = make(root, tmp_path / "run")
    calls = note_calls(monkeypatch, distil if script is distil else script.train)
    result = run(script, cfg)
    assert calls == ["evaluate 0", "record", "record", "evaluate 2", "add_metrics"]
    before = metrics(cfg.directory)
    assert [record["step"] for record in before] == [0, 1]
    assert before[0]["grad_norm"] > 0
    model = hf.load(tmp_path / "run" / "model", hf.read_config(tmp_path / "run" / "model"))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "checkpoints" / "2.sha256.json").unlink()
    assert run(script, cfg) == result
    assert metrics(cfg.directory) == before
    again = hf.load(tmp_path / "run" / "model", hf.read_config(tmp_path / "run" / "model"))
    jax.tree.map(np.testing.assert_array_equal, model, again)


def test_ppo_logs_what_its_field_looks_at(root, tmp_path, monkeypatch):
    evaluated = []

    def reward_and_kl(traj):
        evaluated.append((traj.values, traj.old_logp))
        return metrics_of_a_rollout(traj)

    metrics_of_a_rollout = train.reward_and_kl
    monkeypatch.setattr(train, "reward_and_kl", reward_and_kl)
    followed = Controllers(kl_target=0.01, kl_horizon=10, entropy_target=100.0, entropy_delta=50.0)
    cfg = change(ppo_settings(root, tmp_path / "run"), eval_every=1, critic="shared", critic_model="")
    ppo.main(change(cfg, controllers=followed), VERIFIERS)
    first, last = metrics(cfg.directory)
    wanted = {"reward", "kl_sequence", "kl_coef", "value_loss", "policy_loss", "explained_variance", "clip_fraction"}
    assert wanted | {"value_clip_fraction", "entropy", "eval_reward"} <= set(last)
    assert first["kl_coef"] == pytest.approx(0.05)
    assert first["kl_coef"] != last["kl_coef"]
    assert (first["entropy_coef"], last["entropy_coef"]) == (0, 1)
    assert evaluated
    assert all(fields == (None, None) for fields in evaluated)  # a KL needs the reference alone
    terms = last["policy_loss"] + 0.1 * last["value_loss"] - 1.0 * last["entropy"]
    assert last["loss"] == pytest.approx(terms, rel=1e-3)
    assert first["clip_fraction_first"] == 0
    assert (tmp_path / "run" / "best" / "config.json").is_file()


def test_a_critic_begins_as_the_policy_or_as_the_reward_model(root):
    mesh = make_mesh(fsdp=1, tensor=-1)
    model = str(root / "model")
    config, params, frozen = common_models.load_pretrained(model, Weights(), mesh)
    fresh = common_models.add_critic(params, frozen, config, "separate", "", mesh)["critic"]
    jax.tree.map(np.testing.assert_array_equal, fresh["decoder"], params["decoder"])
    assert not fresh["value_head"].any()
    taught = common_models.add_critic(params, frozen, config, "separate", str(root / "reward"), mesh)["critic"]
    np.testing.assert_array_equal(taught["value_head"], hf.load_score_head(root / "reward"))
    with pytest.raises(ValueError, match="has a trunk of its own; legal: --critic separate"):
        common_models.add_critic(params, frozen, config, "shared", str(root / "reward"), mesh)
    deeper = hf.read_config(root / "teacher")
    other = {"decoder": decoder.init(deeper, jax.random.key(0))}
    with pytest.raises(ValueError, match="has other sizes than the policy"):
        common_models.add_critic(other, {}, deeper, "separate", str(root / "reward"), mesh)


def test_where_the_student_writes_nothing_nothing_is_sampled():
    prompts = Prompts([{}, {}], [[1, 2], [3]], max_tokens=2, completions=[[4, 5, 6], [7]])
    rows = prompts.draw(0, 2)

    def sampled():
        raise AssertionError("sampled")

    mix = make_mix(0.0, Sampling(max_tokens=2, temperature=0.5), prompts, seed=0)
    traj = mix(0, sampled, rows)
    written = [tokens[chosen].tolist() for tokens, chosen in zip(traj.actions, np.asarray(traj.mask), strict=True)]
    assert written == [prompts.completions[i][:2] for i in prompts.indices_of(rows.number)]
    assert np.unique(traj.temperature).tolist() == [0.5]
    with pytest.raises(AssertionError, match="sampled"):
        make_mix(0.5, Sampling(max_tokens=2), prompts, seed=0)(0, sampled, rows)


@pytest.mark.parametrize(
    ("script", "fields", "size"),
    [
        (ppo, {"batches": ppo.Config("", "").batches}, (8, 1)),
        (online_dpo, {"batches": Batches(prompts=32, num_generations=8, minibatches=4)}, (8, 2)),
        (distil, {"on_policy_fraction": 0.5, "batches": Batches(prompts=32, num_generations=1)}, (8, 1)),
    ],
)
def test_the_step_of_debug_is_legal_on_this_machine(script, fields, size, root, tmp_path):
    """A prompt for each of eight devices, and no more completions of one than the run would have."""
    teacher = {"teacher": str(root / "teacher")} if script is distil else {}
    cfg = runs.checked(settings(script, root, tmp_path, mesh=MeshShape(), debug=True, **teacher, **fields))
    assert (cfg.steps, cfg.batches.prompts, cfg.batches.num_generations) == (1, *size)
    train.check_batches(cfg.batches, make_mesh(**cfg.mesh.sizes))
    if script is distil:
        distil.check_settings(cfg)


def test_the_step_of_debug_carries_over_what_divides():
    batches = debug_batches(Batches(prompts=64, num_generations=8, carry_over=3))
    train.check_batches(batches, make_mesh(), carries_over=True)
    assert (batches.num_generations, batches.carry_over) == (2, 8)
    assert debug_batches(Batches(num_generations=8), least_group=5).num_generations == 5


# ----------------------------------------------------------------------------------------------------------- best of n


def best_settings(root, directory, **fields):
    base = dict(prompts_at_once=2, n=3, keep_cut=True, rewards=("share",), sampling=Sampling(max_tokens=8), mesh=MESH)
    names = dict(model=str(root / "model"), prompts=str(root / "prompts.jsonl"), directory=str(directory))
    return best_of_n.Config(**{**base, **names, **fields})


def test_the_best_of_n_is_written_and_a_stopped_run_goes_on(root, tmp_path):
    cfg = best_settings(root, tmp_path / "run")
    found = best_of_n.main(cfg, VERIFIERS)
    assert [row["n"] for row in found] == [1, 2, 3]
    assert [row["KL at most"] for row in found] == pytest.approx([0, np.log(2) - 1 / 2, np.log(3) - 2 / 3])
    assert found[0]["reward"] < found[1]["reward"] < found[2]["reward"]

    judged = (tmp_path / "run" / "judged.jsonl").read_text()
    chosen = (tmp_path / "run" / "chosen.jsonl").read_text()
    rows = [json.loads(line) for line in chosen.splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    for row in rows:
        assert row["reward"] == max(row["rewards"])
        assert row["reward"] == pytest.approx(VERIFIERS["share"](row["completion"], letters=row["letters"]))

    half = judged[: len(judged) // 2]  # in the middle of a line
    (tmp_path / "run" / "judged.jsonl").write_text(half)
    assert best_of_n.main(cfg, VERIFIERS) == found
    assert sorted((tmp_path / "run" / "judged.jsonl").read_text().splitlines()) == sorted(judged.splitlines())
    assert (tmp_path / "run" / "chosen.jsonl").read_text() == chosen


def test_another_choice_samples_nothing_and_none_is_an_error(root, tmp_path):
    cfg = best_settings(root, tmp_path / "run")
    best_of_n.main(cfg, VERIFIERS)
    judged = (tmp_path / "run" / "judged.jsonl").read_text()
    records = [json.loads(line) for line in judged.splitlines()]
    with pytest.raises(ValueError, match=r"no completion is chosen: the best reward is .*; legal: --above less"):
        best_of_n.main(dataclasses.replace(cfg, above=1.0), VERIFIERS)
    assert not (tmp_path / "run" / "chosen.jsonl").read_text()
    best_of_n.main(dataclasses.replace(cfg, above=-1.0), VERIFIERS)
    assert len((tmp_path / "run" / "chosen.jsonl").read_text().splitlines()) == len(ROWS)
    assert (tmp_path / "run" / "judged.jsonl").read_text() == judged
    cut = [record | {"ended": [False] * 3} for record in records]
    assert best_of_n.why_none(cut, None).startswith("0 of 18 ended before max_tokens; legal: --keep_cut")


def test_what_is_chosen():
    record = {"columns": {"answer": "4"}, "prompt": "p", "completions": ["a", "b", "c", "d"]}
    record |= {"rewards": [None, 0.5, 0.5, 1.0], "ended": [True, True, True, False]}
    assert best_of_n.choose(record, None, keep_cut=False)["completion"] == "b"
    assert best_of_n.choose(record, None, keep_cut=True)["completion"] == "d"
    assert best_of_n.choose(record, 0.5, keep_cut=False) is None
    assert best_of_n.choose(record, 0.5, keep_cut=True) == {
        "answer": "4",
        "prompt": "p",
        "completion": "d",
        "reward": 1.0,
        "rewards": [None, 0.5, 0.5, 1.0],
    }


# ----------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "pairs of one": (online_dpo, {"batches__num_generations": 1}, r"num_generations = 1: .*; legal: at least 2"),
    "oversample": (online_dpo, {"batches__oversample": 2}, r"oversample = 2, .*; legal: 1"),
    "a setting of another method": (
        online_dpo,
        {"method": "xpo", "preference__loss": "ipo"},
        r"preference\.loss = 'ipo', which xpo does not read; it reads beta, xpo_alpha",
    ),
    "nash in epochs": (online_dpo, {"method": "nash_md", "batches__epochs": 2}, r"nash_md is right for one update"),
    "a share": (distil, {"on_policy_fraction": 1.5}, r"on_policy_fraction = 1\.5; legal: 0 to 1"),
    "minillm of a file": (
        distil,
        {"divergence": "minillm", "on_policy_fraction": 0.5},
        r"legal: --on_policy_fraction 1",
    ),
    "a mixture": (distil, {"teacher_mixture": 0.2}, r"legal: --teacher_mixture 0"),
    "a teacher that moves": (distil, {"weights__ref_sync_steps": 2}, r"ref_sync_steps = 2; legal .*: 0"),
    "no teacher": (distil, {"teacher": "/absent"}, r"/absent"),
    "a critic": (ppo, {"critic_model": "reward"}, r"legal: --critic separate"),
    "a reward": (ppo, {"rewards": ("shares",)}, r"reward 'shares'; legal: "),
    "one to compare": (
        ppo,
        {"rewards": ("judge:http://h/v1",), "reward__compare": "ranking", "batches__num_generations": 1},
        r"reward\.compare = ranking .*: num_generations = 1 leaves nothing to compare; legal: at least 2",
    ),
    "one to compare in evaluations": (
        online_dpo,
        {"rewards": ("judge:http://h/v1",), "reward__compare": "pairwise", "eval_samples": 2},
        r"reward\.compare = pairwise .*: eval_samples/eval_prompts = 1 leaves nothing to compare",
    ),
    "greedy": (ppo, {"sampling__temperature": 0.0}, r"temperature is 0"),
    "no samples": (distil, {"eval_samples": 0}, r"eval_samples = 0; legal: at least 1"),
    "what nothing reads": (
        ppo,
        {"weights__ref_mixup_alpha": 0.5, "controllers__kl_horizon": 7},
        r"--weights.ref_mixup_alpha 0.5 is read only with --weights.ref_sync_steps\n--controllers.kl_horizon 7 is read",
    ),
}


@pytest.mark.parametrize(("script", "fields", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_one_error(script, fields, message, root, tmp_path):
    base = {"teacher": str(root / "teacher")} if script is distil else {}
    cfg = settings(script, root, tmp_path / "run", **base | fields)
    with pytest.raises((ValueError, OSError), match=message):
        run(script, cfg)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
