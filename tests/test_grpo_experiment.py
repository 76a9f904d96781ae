"""experiments/grpo.py on a model directory made here: what a run leaves, what it refuses, whose run a directory is."""

import dataclasses
import gc
import json
import re
import shutil
import sys
import types
import typing
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from experiments import grpo
from experiments.common import command_line, controllers
from experiments.common import models as common_models
from experiments.common.algorithms import PER_STEP, CriticFree, critic_free
from experiments.common.optimizer import make_optimizer
from experiments.common.settings import (
    Adapter,
    Batches,
    Controllers,
    MeshShape,
    Optimizer,
    PromptData,
    Sampling,
    Weights,
)
from experiments.common.train import check_algorithm
from experiments.tools import export
from models import tiny
from rewards import hostile
from rljax.algorithms import grpo as plain_grpo
from rljax.algorithms import gspo, real, remax, with_kl
from rljax.models import decoder, hf, lora, param_filters, peft
from rljax.rewards.score import RewardError
from rljax.rollouts import self_check
from rljax.train.checkpoint import restore_items
from rljax.train.log import MACHINE_METRICS
from rljax.train.mesh import make_mesh
from rljax.train.run import Run
from rljax.types import TrainState

LETTERS = " abcdefghijklmnopqrstuvwxyz.,!?-:;"
RAW = tiny.config_of("plain") | {"num_hidden_layers": 1}
ROWS = [{"prompt": "once upon"[: 3 + i], "letters": "abcdefghijklm", "what": "yes"} for i in range(6)]
LONG = {"prompt": "a" * 60, "letters": "a", "what": "yes"}  # with 8 tokens of answer it leaves the context of 64
VERIFIERS = grpo.VERIFIERS | {"share": hostile.share_of, "raises": hostile.raises, "says": hostile.says}


def write_tokenizer(directory: Path, letters: str = LETTERS) -> None:
    """One token a character, <s> before a text: 37 ids, as many as the model has."""
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "<unk>"}))


def write_prompts(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> grpo.Config:
    """Two steps of two prompts with two answers each, whose directory does not exist yet."""
    root = tmp_path_factory.mktemp("grpo")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    return grpo.Config(
        model=str(root / "model"),
        prompts=write_prompts(root / "prompts.jsonl", [*ROWS, LONG]),
        rewards=("share", "animals=0.5"),
        seed=1,
        steps=2,
        batches=Batches(prompts=2, num_generations=2),
        sampling=Sampling(max_tokens=8),
        eval_prompts=2,
        eval_samples=4,
        save_every=1,
        directory=str(root / "run"),
        mesh=MeshShape(fsdp=1, tensor=-1),  # two prompts, eight devices
    )


@pytest.fixture(scope="module")
def finished(tiny_run):
    """(its settings, what it returned)"""
    return tiny_run, grpo.main(tiny_run, verifiers=VERIFIERS)


def change(cfg: grpo.Config, **fields) -> grpo.Config:
    """With fields of its blocks as block__field."""
    for name in [name for name in fields if "__" in name]:
        block, field = name.split("__")
        fields[block] = dataclasses.replace(fields.get(block, getattr(cfg, block)), **{field: fields.pop(name)})
    return dataclasses.replace(cfg, **fields)


def metrics(directory) -> list[dict]:
    """All but the clock's."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(s).items() if not k.endswith(MACHINE_METRICS)} for s in lines]


def contents(directory) -> dict[str, bytes]:
    files = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------------------------ what is left


def test_a_run_leaves_what_one_looks_at(finished):
    cfg, result = finished
    directory = Path(cfg.directory)
    first, last = metrics(directory)
    assert {"reward", "kl_sequence", "reward/share", "reward/animals", "kl", "length", "loss", "grad_norm"} <= set(last)
    assert (first["step"], last["step"]) == (0, 1)
    assert "eval_reward" not in first
    assert last["eval_reward"] == result["after"]["reward"]
    assert first["kl_sequence"] == pytest.approx(0, abs=1e-5)  # the policy is the reference yet
    assert first["reward"] == pytest.approx(first["reward/share"] + 0.5 * first["reward/animals"])
    assert 0 < first["reward/share"] < 1
    assert first["grad_norm"] > 0
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-5)
    assert result["after"]["kl"] != 0
    assert "</html>" in (directory / "report.html").read_text()
    record = json.loads((directory / "samples.jsonl").read_text().splitlines()[0])
    assert {"advantage", "logp", "kl", "log_ratio", "entropy", "mask"} <= set(record["tokens"])
    phases = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"sample_seconds", "score_seconds", "update_seconds"} <= set(phases)
    assert {"1", "2"} <= {path.name for path in (directory / "checkpoints").iterdir()}
    assert json.loads((directory / "config.json").read_text())["config"]["batches"]["num_generations"] == 2
    assert (directory / "experiment.py").read_text() == Path(grpo.__file__).read_text()


def test_stopped_and_run_again_it_ends_the_same(finished, capsys):
    """What a run leaves that was stopped after its first step; every number is equal to the last bit."""
    cfg, result = finished
    kept = {name: (Path(cfg.directory) / name).read_bytes() for name in ("config.json", "samples.jsonl")}
    before = metrics(cfg.directory)
    shutil.rmtree(Path(cfg.directory) / "checkpoints" / "2")
    (Path(cfg.directory) / "checkpoints" / "2.sha256.json").unlink()
    capsys.readouterr()
    assert grpo.main(cfg, verifiers=VERIFIERS) == result
    printed = capsys.readouterr().out
    assert "resumed after step 1 of 2" in printed
    assert re.search(r"eval reward: [01]\.\d{3} ± [01]\.\d{3} -> .* nats a sequence; model: .*model\n$", printed)
    assert metrics(cfg.directory) == before
    assert {name: (Path(cfg.directory) / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("offload", [(), ("frozen",)])
def test_a_resumed_run_holds_its_state_once(offload, finished, tmp_path, monkeypatch):
    """Not the parameters that it loaded too, nor a copy on the devices of what waits on the host."""
    shutil.copytree(finished[0].directory, tmp_path / "run")
    for left in ("checkpoints/2", "before.json"):  # so that the model is evaluated before it is restored, too
        shutil.move(tmp_path / "run" / left, tmp_path)
    (tmp_path / "run" / "checkpoints" / "2.sha256.json").unlink()
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(finished[0].directory, str(tmp_path / "run")))
    shape = hf.load(finished[0].model, hf.read_config(finished[0].model))["embedding"].shape

    def held() -> dict[str, int]:
        gc.collect()
        return Counter(x.sharding.memory_kind for x in jax.live_arrays() if x.shape == shape)

    others = held()
    seen = []
    monkeypatch.setattr(Run, "record", lambda *args, record=Run.record: seen.append(held() - others) or record(*args))
    cfg = change(finished[0], directory=str(tmp_path / "run"), weights__offload=offload)
    assert grpo.main(cfg, verifiers=VERIFIERS)["before"] == finished[1]["before"]
    # the parameters, two means of Adam, the reference
    assert seen == [{"device": 3, "pinned_host": 1} if offload else {"device": 4}]


def test_a_resumed_run_does_not_evaluate_the_model_it_began_with_again(finished, tmp_path):
    evaluated = []
    run = types.SimpleNamespace(directory=Path(finished[0].directory))
    assert grpo.train.before_training(run, evaluated.append, "a state") == finished[1]["before"]
    run = types.SimpleNamespace(directory=tmp_path)
    for _ in range(2):
        found = grpo.train.before_training(run, lambda state: evaluated.append(state) or {"reward": np.float32(0.1)}, 1)
        assert found == {"reward": np.float32(0.1)}
    assert evaluated == [1]


def note_calls(monkeypatch, module) -> list[str]:
    """What a script evaluates, records and adds to its log, in order. module: whose make_evaluate it calls."""
    calls = []
    make = module.make_evaluate

    def make_evaluate(*args):
        evaluate = make(*args)
        return lambda state: calls.append(f"evaluate {int(state.step)}") or evaluate(state)

    def noting(name):
        method = getattr(Run, name)
        return lambda run, *args: calls.append(name) or method(run, *args)

    monkeypatch.setattr(module, "make_evaluate", make_evaluate)
    for name in ("record", "add_metrics"):
        monkeypatch.setattr(Run, name, noting(name))
    return calls


def test_a_run_ends_with_a_model_directory_and_keeps_the_best(tiny_run, tmp_path, monkeypatch):
    """Trained on, each loads again with the parameters of its checkpoint; the tokenizer is the model's own."""
    cfg = change(tiny_run, eval_every=1, directory=str(tmp_path / "run"), optimizer__learning_rate=0.1)
    calls = note_calls(monkeypatch, grpo.train)
    grpo.main(cfg, verifiers=VERIFIERS)
    # The last state is evaluated once, when its checkpoint is there: a judge that is gone then costs no step.
    assert calls == ["evaluate 0", "evaluate 1", "record", "record", "evaluate 2", "add_metrics"]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    rewards = [record["eval_reward"] for record in metrics(cfg.directory)]
    assert best == {"step": 1 + int(np.argmax(rewards)), "metric": "eval_reward", "value": max(rewards)}
    config = hf.read_config(cfg.model)
    for name, step in (("model", 2), ("best", best["step"])):
        _, saved = restore_items(tmp_path / "run" / "checkpoints", "params", step=step)
        jax.tree.map(
            np.testing.assert_array_equal,
            hf.load(tmp_path / "run" / name, config),
            jax.device_get(saved["params"]["decoder"]),
        )
        tokenizer = Path(cfg.model, "tokenizer.json").read_bytes()
        assert (tmp_path / "run" / name / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.nightly
def test_groups_carried_over_survive_a_stop(tiny_run, tmp_path):
    """Two of four prompts are carried over; stopped after step two of three, the third is the same to the last bit."""
    cfg = change(tiny_run, steps=3, batches__carry_over=2, sampling__max_tokens=12, directory=str(tmp_path / "run"))
    result = grpo.main(cfg, verifiers=VERIFIERS)
    before = metrics(cfg.directory)
    assert before[0]["version_lag"] == 0 < max(record["version_lag"] for record in before)
    shutil.rmtree(Path(cfg.directory) / "checkpoints" / "3")
    (Path(cfg.directory) / "checkpoints" / "3.sha256.json").unlink()
    assert grpo.main(cfg, verifiers=VERIFIERS) == result
    assert metrics(cfg.directory) == before


@pytest.mark.nightly
def test_pass_rates_survive_a_stop(tiny_run, tmp_path):
    """Prompts that always pass are left out; stopped after step three, the fourth is the same to the last bit."""
    rows = [row | {"letters": row["letters"] * (i % 2)} for i, row in enumerate(ROWS)]  # no letter passes, or most do
    file = write_prompts(tmp_path / "prompts.jsonl", rows)
    data = PromptData(max_pass_rate=0.9)
    cfg = change(tiny_run, prompts=file, steps=4, data=data, directory=str(tmp_path / "run"))
    result = grpo.main(cfg, verifiers=VERIFIERS)
    before = metrics(cfg.directory)
    assert before[0]["prompts_left_out"] == 0 < max(record["prompts_left_out"] for record in before)
    assert 0 < before[0]["pass_rate"] <= 1
    shutil.rmtree(Path(cfg.directory) / "checkpoints" / "4")
    (Path(cfg.directory) / "checkpoints" / "4.sha256.json").unlink()
    assert grpo.main(cfg, verifiers=VERIFIERS) == result
    assert metrics(cfg.directory) == before


def test_packed_it_makes_the_same_first_step(finished, tmp_path):
    cfg, _ = finished
    packed = change(cfg, batches__max_tokens_per_device=90, directory=str(tmp_path / "run"))
    grpo.main(packed, verifiers=VERIFIERS)
    want, got = metrics(cfg.directory)[0], metrics(packed.directory)[0]
    assert want.pop("shared_prefix") == 1
    assert got.pop("shared_prefix") in (0, 1)  # whichever takes fewer rows
    assert got.keys() - want.keys() == {"padding_before", "padding_after", "micro_batches"}
    # Ratios of 1 up to rounding ε: their standard deviation, a root of a difference of squares, is up to √ε.
    assert got.pop("ratio_std") < 4 * np.sqrt(np.finfo(np.float32).eps)
    assert want.pop("ratio_std") < 4 * np.sqrt(np.finfo(np.float32).eps)
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-4, abs=2e-6)


def test_over_long_prompts_are_dropped_and_counted(finished, capsys):
    cfg, _ = finished
    with pytest.raises(ValueError, match="other settings"):  # after prompts are read
        grpo.main(change(cfg, seed=3), verifiers=VERIFIERS)
    found = re.search(
        r"(\d) prompts to train on, (\d) to evaluate on; (\d) dropped, longer than 56 tokens; "
        r"--eval_prompts says how many to hold out\n",  # a third, and more
        capsys.readouterr().out,
    )
    kept, evaluated, dropped = map(int, found.groups())
    assert (kept + evaluated, dropped) == (len(ROWS), 1)


# ----------------------------------------------------------------------------------------------- functions of one's own


def own_loss(cap: float):
    def loss(output, batch):
        ratio = jnp.exp(output.logp - batch.traj.logp)
        return -jnp.minimum(ratio, cap) * batch.advantages, {"capped": (ratio > cap).astype(jnp.float32)}

    return plain_grpo()._replace(loss=loss)


def test_an_own_loss_logs_its_metric_and_another_warns_and_is_recorded(tiny_run, tmp_path, capsys):
    cfg = change(tiny_run, steps=1, directory=str(tmp_path / "run"))
    result = grpo.main(cfg, own_loss(2.0), VERIFIERS)
    (record,) = metrics(cfg.directory)
    assert record["capped"] == 0
    assert {"kl_sequence", "reward/share", "eval_reward"} <= set(record)  # the KL to the start is not in the loss
    assert "kl" not in record
    assert set(result) == {"before", "after"}

    functions = tmp_path / "run" / "functions"
    assert "cap = 2.0" in (functions / "step_0" / "algorithm.py").read_text()
    assert "share_of" in (functions / "step_0" / "rewards.py").read_text()
    other = VERIFIERS | {"share": hostile.length}
    for algorithm, verifiers, changed in (
        (own_loss(2.0), VERIFIERS, None),
        (own_loss(3.0), VERIFIERS, "algorithm.py"),
        (None, VERIFIERS, "algorithm.py"),
        (own_loss(2.0), other, "rewards.py"),
    ):
        capsys.readouterr()
        grpo.main(cfg, algorithm, verifiers)
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == (changed is not None)
        assert all(f"another source than before in {changed}" in line for line in warnings)
        assert (functions / "step_1").exists() == (changed is not None)
        assert metrics(cfg.directory) == [record]


# --------------------------------------------------------------------------------------------------------- algorithms


@pytest.mark.nightly
def test_remax_compares_with_the_greedy_completion(tiny_run, tmp_path):
    """The policy is nearly greedy: nearly every completion is the greedy one, of advantage 0."""
    cfg = change(tiny_run, algorithm="remax", steps=1, sampling__temperature=1e-3, directory=str(tmp_path / "run"))
    grpo.main(cfg, verifiers=VERIFIERS)
    (record,) = metrics(cfg.directory)
    assert record["reward"] > 0
    assert record["loss"] == pytest.approx(0, abs=1e-6)
    compared = {"rewards": ("judge:http://h/v1",), "reward__compare": "pairwise"}
    with pytest.raises(ValueError, match="the greedy one stands alone; legal: another algorithm"):
        grpo.main(change(cfg, **compared))
    with pytest.raises(ValueError, match=r"carry_over = 2: .* greedy .*; legal: 0"):
        grpo.main(change(cfg, batches__carry_over=2, directory=str(tmp_path / "other")), verifiers=VERIFIERS)


def test_the_kl_may_be_in_the_reward(tiny_run, tmp_path):
    fields = {"algorithm": "rloo", "kl_in_reward": True, "optimizer__learning_rate": 0.1}
    cfg = change(tiny_run, directory=str(tmp_path / "run"), **fields)
    cfg = change(cfg, controllers=Controllers(kl_target=0.01, kl_horizon=10))
    grpo.main(cfg, verifiers=VERIFIERS)
    first, last = metrics(cfg.directory)
    assert "kl" not in last
    assert last["kl_sequence"] != 0
    assert first["kl_coef"] != last["kl_coef"]
    with pytest.raises(
        ValueError, match=r"kl_in_reward changes the rewards, and this method .*; legal: without it, or"
    ):
        grpo.main(change(cfg, algorithm="gdpo"), verifiers=VERIFIERS)


@pytest.mark.nightly
def test_gdpo_normalizes_each_of_several_rewards(tiny_run, tmp_path):
    """A reward that is a thousand times another: GRPO learns from it alone, GDPO from both alike."""
    cfg = change(tiny_run, rewards=("share=1000", "length"), steps=1)
    losses = {}
    for name in ("grpo", "gdpo"):
        run = change(cfg, algorithm=name, directory=str(tmp_path / name))
        grpo.main(run, verifiers=VERIFIERS | {"length": hostile.length})
        (losses[name],) = metrics(run.directory)
    assert losses["grpo"]["reward"] == losses["gdpo"]["reward"]
    assert losses["grpo"]["grad_norm"] != pytest.approx(losses["gdpo"]["grad_norm"], rel=1e-3)


def test_every_critic_free_algorithm_is_known_by_its_name():
    table = critic_free(max_tokens=8) | PER_STEP
    assert set(table) == set(typing.get_args(CriticFree))
    assert {"grpo", "dr_grpo", "gspo", "rloo", "remax", "gdpo", "raft", "rft"} <= set(table)
    for name, make in table.items():
        assert set(make().needs) <= {"baseline", "old_logp", "sum_pi_squared"}, name  # what the script can fill


# --------------------------------------------------------------------------------------------------------- bad input


def broken_model(cfg: grpo.Config, root: Path, config: dict | None = None, without: str = "") -> grpo.Config:
    raw = RAW | (config or {})
    tensors = {name: tensor for name, tensor in tiny.tensors_of(raw).items() if name != without}
    write_tokenizer(tiny.write(root / "model", raw, tensors))
    return change(cfg, model=str(root / "model"))


def prompts_of(*rows):
    return lambda cfg, root: change(cfg, prompts=write_prompts(root / "prompts.jsonl", list(rows)))


def settings(**fields):
    return lambda cfg, root: change(cfg, **fields)


NORM = "model.layers.0.input_layernorm.weight"
LEGAL_REWARDS = (
    "legal: animals, code, code_stdin, math, number, text, think, share, raises, says, "
    "the directory of a reward model, "
    "process:DIRECTORY, judge:URL"
)
BAD = {
    "no model": (settings(model="/absent"), OSError, r"no model in /absent: config\.json is missing"),
    "a family": (lambda c, r: broken_model(c, r, {"model_type": "mamba"}), ValueError, r"'mamba'; legal: .*'llama'"),
    "a tensor": (lambda c, r: broken_model(c, r, without=NORM), ValueError, f"tensors missing {re.escape(NORM)}"),
    "fewer ids": (lambda c, r: broken_model(c, r, {"vocab_size": 36}), ValueError, "37 ids, the model 36"),
    "no prompts file": (settings(prompts="/absent.jsonl"), OSError, r"/absent\.jsonl"),
    "empty prompts": (prompts_of(), ValueError, r"prompts\.jsonl is empty: .* at least one row"),
    "column": (settings(template="{question}"), ValueError, r"'\{question\}' .*legal in braces: letters, prompt, what"),
    "max_tokens": (settings(sampling__max_tokens=64), ValueError, "max_tokens = 64 .*legal: a sum of at most 64"),
    "max_prompt": (settings(max_prompt_tokens=57), ValueError, "max_prompt_tokens = 57 .*legal: a sum of at most 64"),
    "all over-long": (prompts_of(LONG, LONG), ValueError, "every prompt is longer than 56 tokens; the shortest has 61"),
    "eval_reward": (settings(eval_prompts=0), ValueError, "0 prompts to hold out; at least 1"),
    "reward": (settings(rewards=("animal",)), ValueError, f"reward 'animal'; {LEGAL_REWARDS}"),
    "weight": (settings(rewards=("share=much",)), ValueError, f"reward 'share=much'; {LEGAL_REWARDS}"),
    "group": (settings(batches__num_generations=0), ValueError, "num_generations = 0; at least 1"),
    "pieces": (
        settings(batches__micro_batches=3),
        ValueError,
        r"2 x 2 = 4 rows .* 1 x 3 = 3 pieces; nearest legal products: \[1, 2, 4\]",
    ),
    "max_tokens_per_device": (
        settings(batches__max_tokens_per_device=4),
        ValueError,
        r"max_tokens_per_device = 4, .* have (\d+) tokens; legal: \1 <= packed_length <= max_tokens",
    ),
    "packed_length": (
        settings(batches__max_tokens_per_device=90, batches__packed_length=9),
        ValueError,
        r"packed_length = 9 .* legal: ",
    ),
    "below 0": (settings(batches__max_tokens_per_device=-1), ValueError, "max_tokens_per_device = -1; at least 0"),
    "devices": (
        settings(mesh=MeshShape()),
        ValueError,
        r"prompts x num_generations = 2 x 2 completions over 8 devices .*nearest legal prompts: \[4\]",
    ),
    "other settings": (settings(seed=3), ValueError, r"holds a run with other settings: seed = 1, now 3\."),
    "another coefficient": (
        settings(kl_coef=0.1),
        ValueError,
        r"other settings: kl_coef = 0\.04, now 0\.1\.",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_harms_no_run(make, kind, message, finished, tmp_path):
    cfg, _ = finished
    left = contents(cfg.directory)
    with pytest.raises(kind, match=message):
        grpo.main(make(cfg, tmp_path), verifiers=VERIFIERS)
    assert contents(cfg.directory) == left


def test_answers_that_cannot_be_judged_by_are_counted_before_the_model_is_loaded(tiny_run, tmp_path, monkeypatch):
    rows = [{"prompt": "once", "answer": answer} for answer in ("4", "12:00", "1,080", "noon", "#### 5")]
    prompts = write_prompts(tmp_path / "times.jsonl", rows)
    cfg = change(tiny_run, rewards=("number",), prompts=prompts, directory=str(tmp_path / "run"))
    monkeypatch.setattr(common_models, "load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    message = r"times\.jsonl, line 2, column 'answer': number cannot judge 2 of 5 rows "
    message += r"\((math or )?text would .*'12:00'\. Legal: "
    with pytest.raises(ValueError, match=message) as error:
        grpo.main(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "raises",
            r"^raises failed on an empty completion, .*line 1: [\s\S]*no such rubric[\s\S]*\nLegal: a finite",
        ),
        (
            "says",
            r"^says failed on an empty completion, .*line 1, .* returned 'yes' \(str\)\nLegal: a finite number",
        ),
        (
            "number",
            r"number asks for answer, which .*line 1 does not have; .* prompt, letters, what",
        ),
    ],
    ids=["raises", "says", "number"],
)
def test_a_reward_at_fault_is_one_error_before_the_first_step(reward, message, tiny_run, tmp_path):
    cfg = change(tiny_run, rewards=(reward,), directory=str(tmp_path / "run"))
    with pytest.raises(RewardError, match=message):
        grpo.main(cfg, verifiers=VERIFIERS)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"model": "/absent"}, 1, r"error: no model in /absent: .*\n"),
        ({"rewards": "animal"}, 1, r"error: reward 'animal'; legal: animals, code, code_stdin, math, number, .*\n"),
        ({"batches.num_generations": 0}, 1, r"error: .*num_generations = 0; at least 1\n"),
        ({"weights.remat": "some"}, 2, r"[\s\S]*--weights.remat[\s\S]*dots[\s\S]*"),
    ],
    ids=["model", "reward", "group", "remat"],
)
def test_the_command_line_says_it_too(fields, code, message, tiny_run, monkeypatch, capsys):
    legal = {"model": tiny_run.model, "prompts": tiny_run.prompts, "directory": "/absent", "batches.prompts": 8}
    words = [part for name, value in (legal | fields).items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *words])
    with pytest.raises(SystemExit) as stop:
        command_line.run(grpo.Config, grpo.main)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert stop.value.code == code
    assert re.fullmatch(message, out + err)


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.nightly
def test_scanned_layers_are_trained_like_single_ones(finished, tmp_path):
    """From the same files to the same numbers, also when the second step is taken again from the first's checkpoint."""
    cfg, _ = finished
    scanned = change(cfg, weights__scan_layers=True, directory=str(tmp_path / "run"))
    grpo.main(scanned, verifiers=VERIFIERS)
    found, wanted = metrics(scanned.directory), metrics(cfg.directory)
    (tmp_path / "run" / "checkpoints" / "2.sha256.json").unlink()  # as if its saving had been interrupted
    grpo.main(scanned, verifiers=VERIFIERS)
    assert metrics(scanned.directory) == found
    for name in ("reward", "completion_tokens", "loss", "grad_norm", "entropy"):
        if name in wanted[0]:
            assert found[0][name] == pytest.approx(wanted[0][name], rel=1e-4, abs=1e-5), name
    _, saved = restore_items(tmp_path / "run" / "checkpoints", "params")
    assert next(iter(saved["params"]["decoder"]["layers"])).startswith("from_0_to_")
    export.main(export.Config(scanned.directory, str(tmp_path / "out")))
    config = hf.read_config(tmp_path / "out")
    jax.tree.map(
        np.testing.assert_array_equal, hf.load(tmp_path / "out", config), hf.load(tmp_path / "run/model", config)
    )


def test_an_adapter_is_trained_in_half_precision_and_exported_both_ways(tiny_run, tmp_path):
    """With a reference that follows it; the base and the optimizer's state are kept in the host's memory."""
    weights = Weights(
        dtype="bfloat16",
        remat="full",
        adapter=Adapter(rank=2, targets=("query", "mlp/")),
        offload=("opt_state", "frozen"),
        ref_sync_steps=1,
        ref_mixup_alpha=0.5,
    )
    cfg = change(tiny_run, weights=weights, directory=str(tmp_path / "run"), optimizer__learning_rate=0.1)
    grpo.main(cfg, verifiers=VERIFIERS)
    first, last = metrics(cfg.directory)
    assert first["kl_sequence"] == pytest.approx(0, abs=0.2)
    assert last["kl_sequence"] != 0
    step, saved = restore_items(tmp_path / "run" / "checkpoints", "params", "frozen")
    assert (step, saved["params"].keys(), saved["frozen"].keys()) == (2, {"lora"}, {"base", "reference"})

    def half_way(now, reference):
        np.testing.assert_array_equal(now.shape, reference.shape)
        return float(np.abs(now).max()) > 0 and float(np.abs(now - reference).max()) > 0

    ups = jax.tree.map(half_way, saved["params"]["lora"], saved["frozen"]["reference"]["lora"])
    assert any(jax.tree.leaves(ups))
    export.main(export.Config(cfg.directory, str(tmp_path / "merged")))
    export.main(export.Config(cfg.directory, str(tmp_path / "alone"), adapter="separate"))
    config = hf.read_config(tmp_path / "merged")
    adapter, low_rank = peft.load_adapter(tmp_path / "alone", config)
    merged = lora.merge(adapter, hf.load(cfg.model, config), low_rank)  # in full precision, into the base itself
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "merged", config), jax.device_get(merged))


@pytest.mark.nightly
def test_in_half_precision_gspo_clips_nothing_at_first_and_controllers_move_their_coefficients(tiny_run, tmp_path):
    fields = {"weights__dtype": "bfloat16", "directory": str(tmp_path / "run"), "batches__minibatches": 2}
    followed = Controllers(kl_target=0.01, kl_horizon=10, entropy_target=100.0, entropy_delta=0.25)
    cfg = change(tiny_run, controllers=followed, optimizer__learning_rate=0.1, optimizer__warmup_steps=0, **fields)
    grpo.main(cfg, with_kl(gspo(), 0.04), VERIFIERS)
    first, last = metrics(cfg.directory)
    assert first["clip_fraction_first"] == last["clip_fraction_first"] == 0
    assert {"sampler_kl", "kl_old"} <= set(first)  # the trainer's own old_logp
    assert (first["kl_coef"], first["entropy_coef"], last["entropy_coef"]) == (pytest.approx(0.04), 0, 0.25)
    assert abs(last["kl_coef"] - 0.04) > 1e-3
    with pytest.raises(ValueError, match="kl_target changes the coefficient of with_kl"):
        grpo.main(change(cfg, directory=str(tmp_path / "other")), gspo(), VERIFIERS)
    several = change(cfg, directory=str(tmp_path / "several"))
    with pytest.raises(ValueError, match=r"reinforce is right for one update .* = 1 x 2; legal: 1 x 1"):
        grpo.main(several, remax(), VERIFIERS)


def test_a_batch_invariant_run_begins_with_the_self_check(tiny_run, tmp_path, monkeypatch, capsys):
    """The gap is made up here: which kernels this machine has is no matter of the recipe."""
    with pytest.raises(ValueError, match="batch_invariant: head_dim is 8"):
        grpo.main(change(tiny_run, weights__batch_invariant=True, directory=str(tmp_path / "no")), verifiers=VERIFIERS)
    raw = RAW | tiny.heads(2, head_dim=16)
    write_tokenizer(tiny.write(tmp_path / "model", raw, tiny.tensors_of(raw)))
    one_step = change(tiny_run, model=str(tmp_path / "model"), steps=1, weights__batch_invariant=True)

    monkeypatch.setattr(self_check, "sampler_gap", lambda *_: 2e-6)
    with pytest.raises(ValueError, match="batch_invariant does not hold on 8 x cpu"):
        grpo.main(change(one_step, directory=str(tmp_path / "refused")), verifiers=VERIFIERS)
    assert "differ by at most 2e-06" in capsys.readouterr().out
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()

    limits = []
    checked = []
    monkeypatch.setattr(self_check, "sampler_gap", lambda *arguments: checked.append(arguments) or 0.0)
    monkeypatch.setattr(grpo, "require_on_policy", lambda metrics, limit: limits.append(limit))
    grpo.main(change(one_step, directory=str(tmp_path / "run")), verifiers=VERIFIERS)
    assert limits == [0.0]
    [(_, _, params, frozen, vocab_size)] = checked
    assert (set(params), set(frozen), vocab_size) == ({"decoder"}, {"reference"}, 37)
    config, *_ = common_models.load_pretrained(one_step.model, one_step.weights, make_mesh(fsdp=1, tensor=-1))
    assert config.batch_invariant


def test_frozen_parts_stand_below_what_is_trained(tiny_run):
    mesh = make_mesh(fsdp=1, tensor=-1)
    config, trained, frozen = common_models.load_pretrained(tiny_run.model, Weights(freeze=("embedding", "norm")), mesh)
    assert param_filters.param_paths(frozen["base"]) == [
        "decoder/embedding",
        "decoder/layers/0/attention_norm/scale",
        "decoder/layers/0/mlp_norm/scale",
        "decoder/norm/scale",
    ]
    assert len(param_filters.param_paths(trained)) == 7
    jax.tree.map(np.testing.assert_array_equal, trained, frozen["reference"])
    whole = decoder.full_params(config, trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, whole["decoder"], hf.load(tiny_run.model, config))
    with pytest.raises(ValueError, match=r"leave out --weights\.freeze or --weights\.adapter\.rank"):
        common_models.load_pretrained(tiny_run.model, Weights(adapter=Adapter(rank=2), freeze=("norm",)), mesh)


def test_weight_decay_is_for_matrices():
    params = {
        "layers": {0: {"mlp": {"up": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}, "query_bias": jnp.ones((1, 2))}}
    }
    made = make_optimizer(Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), made.update(zeros, made.init(params), params)[0])
    assert moved["layers"][0]["mlp"]["up"] == pytest.approx(0.05)
    assert moved["layers"][0]["norm"]["scale"] == moved["layers"][0]["query_bias"] == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_grad_norm", (0.0, -1.0, float("inf"), float("nan"))),
        ("learning_rate", (-1e-4, float("nan"))),
        ("warmup_steps", (-1,)),
        ("weight_decay", (-0.1,)),
        ("beta2", (1.0, -0.1)),
    ],
)
def test_an_optimizer_that_would_not_learn_is_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"optimizer\.{name} = {value}; legal: at least 0|{name} = .*: above 0;"):
            make_optimizer(Optimizer(**{name: value}), 10)


def test_a_step_without_a_decision_moves_no_coefficient():
    """Its entropy is NaN: to take it for 0 would be to see a collapse."""
    cfg = Controllers(entropy_target=0.5, kl_target=1.0)
    coefficients = {"entropy": jnp.float32(0.1), "last_entropy": jnp.float32(0.8), "kl": jnp.float32(0.2)}
    state = TrainState(0, {}, (), jax.random.key(0), coefficients=coefficients)
    nothing = {"entropy": float("nan"), "kl": float("nan"), "kl_sequence": float("nan")}
    state, shown = controllers.adapt(cfg, state, nothing, 8)
    assert state.coefficients == coefficients
    assert (shown["entropy_coef"], shown["kl_coef"]) == (jnp.float32(0.1), jnp.float32(0.2))
    state, _ = controllers.adapt(cfg, state, nothing | {"entropy": 0.3}, 8)
    assert state.coefficients["entropy"] > 0.1
    assert state.coefficients["last_entropy"] == jnp.float32(0.3)


def test_a_loss_that_compares_completions_is_not_cut_into_minibatches():
    for sizes in (Batches(minibatches=2), Batches(max_tokens_per_device=512)):
        with pytest.raises(ValueError, match=r"real compares .* separate them; legal: 1, 0$"):
            check_algorithm(real(), sizes)
    table = critic_free(max_tokens=8) | PER_STEP
    alone = {"remax", "reinforce_pp", "topr", "rft", "psr", "nsr", "w_reinforce"}
    for name, make in table.items():
        if name in alone:
            check_algorithm(make(), Batches(num_generations=1))
            continue
        least = "5" if name == "pass_at_k_training" else "2"
        with pytest.raises(ValueError, match=rf"{name} compares the .* leaves too few; legal: {least} or more$"):
            check_algorithm(make(), Batches(num_generations=int(least) - 1), name)
        check_algorithm(make(), Batches(num_generations=int(least)), name)
    with pytest.raises(ValueError, match=r"remax learns from every completion: filter_groups .*; legal: without it"):
        check_algorithm(remax(), Batches(filter_groups=True), "remax")
    check_algorithm(real(), Batches(epochs=2))
