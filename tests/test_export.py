"""From a checkpoint to a directory that transformers loads: the same bits, or nothing at all."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from experiments.common import arithmetic
from experiments.tools import export
from models import tiny
from rljax.models import heads, hf, lora, peft, policy, stacks
from rljax.models.lora import LoraConfig
from rljax.train.checkpoint import Checkpoints
from rljax.types import TrainState, trajectory_of_tokens
from test_grpo_experiment import write_tokenizer


def saved_run(place: Path, params, frozen=None, adapter=None, about=None, steps=(1, 2)) -> Path:
    """A run directory with checkpoints of these steps; the parameters of step s are those given plus s."""
    checkpoints = Checkpoints(place / "checkpoints")
    for step in steps:
        now = jax.tree.map(lambda x, s=step: x + s, params)
        checkpoints.save(step, TrainState(step, now, optax.EmptyState(), jax.random.key(0), frozen=frozen or {}))
    checkpoints.close()
    hf.copy_sidecar_files(about, place / "model_files", adapter)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its directory, config and parameters."""
    directory = tiny.make(tmp_path_factory.mktemp("model"), "plain")
    config = hf.read_config(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return directory, config, policy.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    directory, _, params = model
    return saved_run(tmp_path_factory.mktemp("run"), params, about=directory)


def written(directory: Path) -> dict[str, np.ndarray]:
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def same(found: dict, config, decoder_params, dtype=np.float32) -> None:
    wanted = {name: x.astype(dtype) for name, x in hf.named_tensors(config, jax.device_get(decoder_params))}
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize(("step", "dtype"), [(0, ""), (1, "bfloat16")])
def test_a_checkpoint_is_written_as_it_is(model, run, tmp_path, step, dtype):
    directory, config, params = model
    export.main(export.Config(str(run), str(tmp_path / "out"), step=step, dtype=dtype))
    now = jax.tree.map(lambda x: x + (step or 2), params["decoder"])
    same(written(tmp_path / "out"), config, now, ml_dtypes.bfloat16 if dtype else np.float32)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about == json.loads((directory / "config.json").read_text()) | {"dtype": dtype or "float32"}
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (directory / name).read_text()
    assert hf.read_config(tmp_path / "out") == config


def test_large_models_are_written_in_parts_with_an_index(model, run, tmp_path):
    export.main(export.Config(str(run), str(tmp_path / "out"), shard_gigabytes=4e-6))
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert {name for name, place in index["weight_map"].items() if place == file} == load_file(
            tmp_path / "out" / file
        ).keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in written(tmp_path / "out").values())
    same(written(tmp_path / "out"), model[1], jax.tree.map(lambda x: x + 2, model[2]["decoder"]))


@pytest.mark.parametrize("adapted", [False, True])
def test_scanned_layers_are_written_one_by_one(model, tmp_path, adapted):
    """A checkpoint has them stacked; an adapter is merged into the base that is there, or written alone."""
    directory, config, _ = model
    adapter = LoraConfig(rank=3, targets=("query", "mlp")) if adapted else None
    scanned = dataclasses.replace(config, scan_layers=True, adapter=adapter)
    params, frozen = {"decoder": hf.load(directory, scanned)}, {}
    if adapted:
        params, frozen = policy.with_adapter(params, scanned, jax.random.key(1))
    place = saved_run(tmp_path / "run", params, frozen, adapter, directory)
    export.main(export.Config(str(place), str(tmp_path / "out")))
    now = jax.tree.map(lambda x: x + 2, params)
    if not adapted:
        same(written(tmp_path / "out"), config, stacks.unstack(now["decoder"]))
        return
    merged = lora.merge(adapter, hf.load(directory, config), stacks.unstack(now["lora"]))
    found = written(tmp_path / "out")
    for name, x in hf.named_tensors(config, jax.device_get(merged)):
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5)
    export.main(export.Config(str(place), str(tmp_path / "alone"), adapter="separate"))
    _, alone = peft.load_adapter(tmp_path / "alone", scanned)
    jax.tree.map(np.testing.assert_array_equal, alone, now["lora"])


def test_adapters_are_merged_into_their_base(model, tmp_path):
    directory, config, _ = model
    params = {"decoder": hf.load(directory, config)}
    adapter = LoraConfig(rank=3, targets=("query", "layers/1/mlp"))
    trained, frozen = policy.with_adapter(params, dataclasses.replace(config, adapter=adapter), jax.random.key(1))
    place = saved_run(tmp_path / "run", trained, frozen, adapter, directory)
    export.main(export.Config(str(place), str(tmp_path / "out")))
    now = jax.tree.map(lambda x: x + 2, trained["lora"])
    same(written(tmp_path / "out"), config, lora.merge(adapter, params["decoder"], now))
    export.main(export.Config(str(place), str(tmp_path / "alone"), adapter="separate"))
    found, alone = peft.load_adapter(tmp_path / "alone", config)
    assert (found.rank, found.alpha) == (adapter.rank, adapter.alpha)
    jax.tree.map(np.testing.assert_array_equal, alone, now)
    record = tmp_path / "run" / "model_files" / "adapter.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": "/gone"}))
    export.main(export.Config(str(place), str(tmp_path / "from the checkpoint")))
    same(written(tmp_path / "from the checkpoint"), config, lora.merge(adapter, params["decoder"], now))
    named = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(directory)
    scored = {**trained, "score_head": np.zeros(config.hidden_size, np.float32)}
    place = saved_run(tmp_path / "scored", scored, frozen, adapter, directory, steps=(1,))
    with pytest.raises(ValueError, match="a score head, which an adapter's files do not hold; legal: --adapter merged"):
        export.main(export.Config(str(place), str(tmp_path / "no head"), adapter="separate"))


def test_an_interrupted_export_leaves_nothing(model, run, tmp_path, monkeypatch):
    out, real = tmp_path / "out", hf.save_file
    monkeypatch.setattr(hf, "save_file", lambda tensors, file, about: real(tensors, file, about) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main(export.Config(str(run), str(out)))
    assert not out.exists()
    monkeypatch.undo()
    export.main(export.Config(str(run), str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="is not empty; name a directory that does not exist yet"):
        export.main(export.Config(str(run), str(out)))


def test_what_cannot_be_exported_is_said(model, run, tmp_path):
    for changes, message in (
        ({"run": str(tmp_path)}, "is no run directory of a language model"),
        ({"step": 7}, r"no checkpoint of step 7 in .*; legal: \[2, 1\]"),
        ({"adapter": "separate"}, "trained no adapter; legal: --adapter merged"),
    ):
        cfg = dataclasses.replace(export.Config(str(run), str(tmp_path / "out")), **changes)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export.main(cfg)


def test_a_damaged_checkpoint_is_not_exported(model, tmp_path):
    place = saved_run(tmp_path / "run", model[2], about=model[0], steps=(1,))
    file = max((place / "checkpoints" / "1").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match="checkpoint 1 is damaged: 1 files differ"):
        export.main(export.Config(str(place), str(tmp_path / "out")))


def with_pad(directory: Path, pad: int = 36) -> Path:
    """The model directory, whose config names a padding token that no answer has."""
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"pad_token_id": pad, "eos_token_id": 2, "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_a_reward_model_comes_back_with_its_head(model, tmp_path):
    directory, config, params = model
    params = heads.with_score_head(params, config, jax.random.key(5))
    place = saved_run(tmp_path / "run", params, about=directory, steps=(1,))
    with_pad(place / "model_files", pad=2)
    with pytest.raises(ValueError, match=r"pad_token_id is 2, eos_token_id 2; .* legal: the id of a token that no"):
        export.main(export.Config(str(place), str(tmp_path / "out")))
    with_pad(place / "model_files")
    export.main(export.Config(str(place), str(tmp_path / "out")))
    assert "lm_head.weight" not in written(tmp_path / "out")
    np.testing.assert_array_equal(hf.load_score_head(tmp_path / "out"), params["score_head"] + 1)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is a reward model and writes no text"):
        hf.read_config(tmp_path / "out")
    config = hf.read_config(tmp_path / "out", reward_model=True)
    read = hf.load(tmp_path / "out", config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), read, {n: params["decoder"][n] for n in read})
    more = {"decoder": read, "score_head": params["score_head"]}
    again = saved_run(tmp_path / "again", more, about=tmp_path / "out", steps=(1,))  # a run that began from it
    export.main(export.Config(str(again), str(tmp_path / "out again")))
    np.testing.assert_array_equal(hf.load_score_head(tmp_path / "out again"), params["score_head"] + 1)
    with pytest.raises(ValueError, match=r"holds no score.weight: it is no reward model"):
        hf.load_score_head(directory)


@pytest.mark.parametrize(
    ("special", "named", "pad"),
    [
        (["<unk>", "<s>", "</s>"], {"pad_token": "</s>"}, "<unk>"),  # as stories260k
        (["<|begin|>", "</s>", "<|right_pad|>"], {"bos_token": "<|begin|>"}, "<|right_pad|>"),
        (["<s>", "</s>"], {"bos_token": {"content": "<s>"}, "pad_token": None}, "<s>"),
        (["</s>", "<|turn|>"], {"pad_token": "</s>"}, "<|turn|>"),
        (["</s>", *(f"<{i}>" for i in range(1, 37)), "<pad>"], {"pad_token": "<pad>"}, "<1>"),  # 37: no row
    ],
)
def test_a_reward_model_is_padded_with_a_token_that_ends_no_text(special, named, pad, model, tmp_path):
    directory, config, params = model
    hf.copy_config_and_tokenizer(directory, tmp_path / "about")
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(special)]
    (tmp_path / "about" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"} | named
    (tmp_path / "about" / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None, "pad_token_id": None}
    (tmp_path / "about" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "about" / "generation_config.json").unlink()
    hf.save(tmp_path / "out", config, params["decoder"], tmp_path / "about", score_head=np.zeros(config.hidden_size))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == special.index(pad)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == pad


def test_a_model_made_by_a_script_brings_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    task = arithmetic.make_task("additions", eval_prompts=1024, seed=0, width=16, layers=1)
    arithmetic.save_model_files(task.tokenizer, task.config, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("12+34=046")["input_ids"] == task.tokenizer.encode("12+34=046")
    assert tokenizer.decode(task.tokenizer.encode("12+34=046")) == "12+34=046"
    assert (tokenizer.eos_token_id,) == task.tokenizer.stop
    assert hf.read_config(tmp_path / "model") == dataclasses.replace(
        task.config, ropes=(task.config.rope(0),), windows=()
    )


@pytest.mark.parity
def test_transformers_scores_as_the_reward_model_did(model, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is absent")
    from transformers import AutoModelForSequenceClassification

    directory, config, params = model
    params = heads.with_score_head(params, config, jax.random.key(5))
    hf.copy_config_and_tokenizer(directory, tmp_path / "about")
    about = with_pad(tmp_path / "about")
    hf.save(tmp_path / "out", config, params["decoder"], about, score_head=params["score_head"])
    tokens = np.arange(12).reshape(2, 6)
    traj = trajectory_of_tokens(tokens, np.ones((2, 6), int), np.arange(6) >= np.full((2, 1), 3), np.zeros((2, 6)))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits[:, 0].numpy()
    np.testing.assert_allclose(heads.make_reward_model(config)(params, {}, traj), want, rtol=0, atol=2e-5)


@pytest.mark.parity
def test_transformers_scores_a_padded_batch_at_the_last_tokens(tmp_path):
    """Of a tokenizer without a padding token, whose completions end with EOS: padding with EOS would hide it."""
    torch = pytest.importorskip("torch", reason="torch is absent")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    raw = tiny.config_of("plain") | {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "pad_token_id": None}
    directory = tiny.write(tmp_path / "model", raw, tiny.tensors_of(raw))
    write_tokenizer(directory)
    config = hf.read_config(directory)
    params = heads.with_score_head({"decoder": hf.load(directory, config)}, config, jax.random.key(5))
    hf.save(tmp_path / "out", config, params["decoder"], directory, score_head=params["score_head"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["once upon a time</s>", "no</s>"]
    rows = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        want = theirs(**rows).logits[:, 0].numpy()
    score = heads.make_reward_model(config)
    for text, wanted in zip(texts, want, strict=True):
        tokens = np.array([tokenizer(text)["input_ids"]])
        assert tokens[0, -1] == 2
        chosen = np.arange(tokens.shape[1])[None] > 0
        traj = trajectory_of_tokens(tokens, np.ones_like(tokens), chosen, np.zeros(tokens.shape))
        np.testing.assert_allclose(score(params, {}, traj)[0], wanted, rtol=0, atol=2e-5)
