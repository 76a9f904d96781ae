"""Scripts that learn from a file: what a run leaves, that it goes on as if never stopped, what it refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import dpo, process_reward, reward_model, sft
from experiments.common import data, offline
from experiments.common.settings import Adapter, Data, MeshShape, Optimizer, Weights
from models import tiny
from rljax import algorithms
from rljax.data.demonstrations import EMPTY
from rljax.data.examples import Comparison, Example
from rljax.data.preferences import collate_pairs
from rljax.models import decoder, hf
from rljax.train.checkpoint import restore_items
from rljax.train.mesh import make_mesh, state_shardings
from rljax.types import TrainState
from test_grpo_experiment import RAW, contents, metrics, note_calls, write_tokenizer

ANIMALS = ("a cat", "a dog", "a bird", "a fish", "a cow", "a hen")
PROMPTS = [f"there was {animal}" for animal in ANIMALS]
PAIRS = [{"prompt": prompt, "chosen": " who ran.", "rejected": " who slept."} for prompt in PROMPTS]
ROWS = {
    "demonstrations": [{"prompt": prompt, "completion": " who ran."} for prompt in PROMPTS],
    "pairs": PAIRS,
    "rated": [row | {"margin": 0.5 + i} for i, row in enumerate(PAIRS)],
    "gold": [row | {"gold": " who flew."} for row in PAIRS],
    "rankings": [
        {"prompt": p, "completions": [" ran.", " sat.", " slept."][: 2 + i % 2]} for i, p in enumerate(PROMPTS)
    ],
    "judgments": [
        {"prompt": p, "completion": " ran." if i % 2 else " sat.", "label": i % 2 == 1} for i, p in enumerate(PROMPTS)
    ],
    "steps": [
        {"prompt": p, "completions": ["ran.", "sat."], "labels": [True, i % 2 == 0]} for i, p in enumerate(PROMPTS)
    ],
}
CASES = {
    "dft, packed": (sft, "demonstrations", {"loss": "dft", "max_tokens_per_device": 64}),
    "reward_model": (reward_model, "rated", {"center_rewards_coefficient": 0.01}),
    "reward_model, rankings": (reward_model, "rankings", {"ranking_loss": "kwise"}),
    "process_reward": (process_reward, "steps", {"separator": ","}),
    "dpo, an adapter": (dpo, "pairs", {"weights": Weights(adapter=Adapter(rank=2))}),
    "bco of pairs": (dpo, "pairs", {"loss": "bco"}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a model and a file of each kind of rows."""
    root = tmp_path_factory.mktemp("offline")
    write_tokenizer(tiny.write(root / "model", RAW, tiny.tensors_of(RAW)))
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config_of(root: Path, script, rows: str, fields: dict, directory: Path):
    """Two steps of two rows each on one row's share of the devices; two rows are held out."""
    return script.Config(
        model=str(root / "model"),
        data=Data(files=(str(root / f"{rows}.jsonl"),), eval_size=2),
        steps=2,
        batch_size=2,
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=0),
        mesh=MeshShape(fsdp=1, tensor=-1),
        eval_every=1,
        save_every=1,
        directory=str(directory),
        **fields,
    )


AT_NIGHT = {"reward_model, rankings", "bco of pairs"}  # other rows in the loops of the others


@pytest.mark.parametrize(
    ("script", "rows", "fields"),
    [pytest.param(*case, marks=pytest.mark.nightly if name in AT_NIGHT else ()) for name, case in CASES.items()],
    ids=CASES,
)
def test_a_run_goes_on_where_it_stopped_and_leaves_a_model(script, rows, fields, root, tmp_path, monkeypatch):
    cfg = config_of(root, script, rows, fields, tmp_path / "run")
    calls = note_calls(monkeypatch, offline)
    result = script.main(cfg)
    assert calls == ["evaluate 0", "evaluate 1", "record", "record", "evaluate 2", "add_metrics"]
    assert result["after"]["eval_loss"] != result["before"]["eval_loss"]
    left = contents(tmp_path / "run" / "model")
    before = metrics(cfg.directory)
    assert before[-1]["eval_loss"] == result["after"]["eval_loss"]

    is_reward_model = script in (reward_model, process_reward)
    config = hf.read_config(tmp_path / "run" / "model", reward_model=is_reward_model)
    written = hf.load(tmp_path / "run" / "model", config)
    _, saved = restore_items(tmp_path / "run" / "checkpoints", "params", step=2)
    if "decoder" in saved["params"]:
        trained = {name: saved["params"]["decoder"][name] for name in written}
        jax.tree.map(np.testing.assert_array_equal, written, jax.device_get(trained))
    if is_reward_model:
        np.testing.assert_array_equal(hf.load_score_head(tmp_path / "run" / "model"), saved["params"]["score_head"])
        kind = "process" if script is process_reward else "outcome"
        for name in ("model", "best", "model_files"):
            assert hf.reward_kind(tmp_path / "run" / name) == kind

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "checkpoints" / "2.sha256.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    assert script.main(cfg) == result
    assert metrics(cfg.directory) == before
    assert contents(tmp_path / "run" / "model") == left
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["value"] == before[best["step"] - 1][best["metric"]]


def test_the_error_of_an_accuracy_is_that_of_prompts():
    """Three prompts with 4, 2 and 1 pairs in batches of 4; a score is the number that the last token is."""
    prompts, right = np.array([5, 5, 6, 5, 7, 5, 6]), np.array([1, 1, 0, 1, 0, 1, 1])
    pairs = [
        Comparison(*(Example([prompt], [3, score], [True] * 2, {}) for score in (2 * is_right, 1)), None)
        for prompt, is_right in zip(prompts.tolist(), right.tolist(), strict=True)
    ]

    def score(params, frozen, traj):
        last = traj.mask.shape[1] - 1 - jnp.argmax(traj.mask[:, ::-1], axis=1)
        return jnp.take_along_axis(traj.actions, last[:, None], axis=1)[:, 0].astype(float)

    filled = offline.filled(pairs, 4, Comparison(EMPTY, EMPTY, None))
    batches = [collate_pairs(part, 1, 2) for part in filled]
    state = TrainState(0, {"w": jnp.zeros(2)}, optax.EmptyState(), jax.random.key(0))
    shardings = state_shardings(make_mesh(fsdp=1, tensor=-1), state, optax.identity(), {"w": (None,)})
    evaluate = offline.make_evaluate(algorithms.reward_model(score), pairs, batches, ("accuracy",), 2, shardings)
    found = evaluate(state)
    assert found["eval_accuracy"] == pytest.approx(5 / 7)
    of_prompts = np.array([4 - 4 * 5 / 7, 1 - 2 * 5 / 7, 0 - 5 / 7])
    assert found["eval_accuracy_error"] == pytest.approx(np.sqrt(3 / 2 * (of_prompts**2).sum()) / 7)
    losses = np.log1p(np.exp(1 - 2 * right))
    assert found["eval_loss"] == pytest.approx(losses.mean())


def test_packed_demonstrations_make_the_same_first_step(root, tmp_path):
    cfg = config_of(root, sft, "demonstrations", {}, tmp_path / "alone")
    sft.main(cfg)
    packed = dataclasses.replace(cfg, max_tokens_per_device=64, eval_every=0, directory=str(tmp_path / "packed"))
    sft.main(packed)
    assert (tmp_path / "alone" / "best").is_dir()
    assert not (tmp_path / "packed" / "best").exists()  # without evaluations there is none but the last
    one, other = (metrics(tmp_path / name)[0] for name in ("alone", "packed"))
    assert one["eval_loss"] > metrics(tmp_path / "alone")[1]["eval_loss"]
    for name in ("loss", "grad_norm", "tokens"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize(
    ("script", "rows", "fields", "message"),
    [
        (sft, "demonstrations", {"batch_size": 0}, "batch_size = 0, .* a multiple of 1"),
        (sft, "demonstrations", {"batch_size": 3, "micro_batches": 2}, "batch_size = 3, micro_batches = 2 .* of 2"),
        (sft, "demonstrations", {"max_tokens_per_device": 4}, "4 tokens at a time hold no row of"),
        (sft, "demonstrations", {"weights": Weights(ref_sync_steps=2)}, "ref_sync_steps = 2; legal when .*: 0"),
        (dpo, "pairs", {"weights": Weights(batch_invariant=True)}, "--weights.batch_invariant: nothing is sampled"),
        (reward_model, "pairs", {"ranking_loss": "kwise"}, "--ranking_loss kwise is read only with rankings"),
        (reward_model, "rankings", {"center_rewards_coefficient": 0.1}, "_coefficient 0.1 is read only with pairs"),
        (sft, "pairs", {}, "column"),
        (dpo, "pairs", {"loss": "odpo"}, "a pair without a margin; this method wants one"),
        (dpo, "pairs", {"loss": "tpo"}, "a pair without a column gold"),
        (dpo, "demonstrations", {}, "column"),
    ],
)
def test_what_is_refused_before_anything_is_written(script, rows, fields, message, root, tmp_path):
    cfg = config_of(root, script, rows, {}, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(cfg, **fields))
    assert not (tmp_path / "run").exists()


class Loaded(Exception):
    """The model would be read now."""


@pytest.mark.parametrize(
    ("script", "names", "advice"),
    [
        (dpo, ("chosen", "rejected"), ""),
        (reward_model, ("chosen", "rejected"), ""),
        (sft, ("completion",), ", and --max_tokens_per_device packs"),
    ],
)
def test_rows_are_as_long_as_the_longest_one_and_much_padding_is_said(
    script, names, advice, root, tmp_path, monkeypatch, capsys
):
    """The longest prompt and the longest completion are of different rows."""
    texts = dict(zip(names, "bc", strict=False))
    short = [{"prompt": letter, **texts} for letter in "defghijk" * 40]
    long = [{"prompt": "x" * 40, **texts}, {"prompt": "y", **texts, names[0]: "z" * 20}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*short, *long]))

    def load(directory, weights, mesh, context, *others, **more):
        raise Loaded(f"{context} tokens")

    monkeypatch.setattr(script.models, "load_pretrained", load)
    cfg = config_of(root, script, "pairs", {}, tmp_path / "run")
    cfg = dataclasses.replace(cfg, data=Data(files=(str(tmp_path / "rows.jsonl"),), eval_size=2))
    with pytest.raises(Loaded, match=r"^43 tokens$"):  # <s>, the prompt, a letter and </s>
        script.main(cfg)
    said = " ".join(capsys.readouterr().out.split())
    narrower = "99 % of them have at most 4: --data.max_tokens 4 leaves the others out"
    assert re.search(rf"\d\d% is padding. {narrower}{advice}", said)


def test_no_limit_is_advised_that_leaves_many_rows_out(capsys):
    data.report_padding([1] * 95 + [100] * 5, 100, "rows", "{}")
    assert capsys.readouterr().out.endswith("94% is padding\n")
    data.report_padding([50, 100], 100, "rows", "{}")
    assert not capsys.readouterr().out


def test_the_pieces_of_a_reward_model_are_those_of_the_longest_ranking_of_all(root, tmp_path, monkeypatch):
    """All batches are as wide as the longest ranking, which is held out here."""
    read = data.read_examples

    def read_longer_ones_to_evaluate_on(*arguments):
        found = read(*arguments)
        return found._replace(train=[row[:2] for row in found.train], eval=[(row * 2)[:4] for row in found.eval])

    def cut(config, batch_size, wanted, prompt_tokens, tokens, shardings):
        raise Loaded(f"{tokens} tokens")

    monkeypatch.setattr(data, "read_examples", read_longer_ones_to_evaluate_on)
    monkeypatch.setattr(offline, "choose_micro_batches", cut)
    with pytest.raises(Loaded, match=rf"^{4 * len(' slept.$')} tokens$"):
        reward_model.main(config_of(root, reward_model, "rankings", {}, tmp_path / "run"))


@pytest.mark.parametrize("held_out", [1, 64])
def test_the_step_of_debug_evaluates_on_no_more_rows_than_it_learns_from(held_out):
    cfg = dpo.Config(model="", data=Data(eval_size=held_out), debug=True)
    small = offline.one_small_step(cfg)
    assert (small.steps, small.batch_size, small.data.eval_size) == (1, 8, min(held_out, 8))


def test_rows_of_two_kinds_are_refused(root, tmp_path):
    mixed = [*ROWS["pairs"][:3], ROWS["rankings"][3], *ROWS["rated"][4:]]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    cfg = config_of(root, reward_model, "pairs", {}, tmp_path / "run")
    with pytest.raises(ValueError, match="of 6 rows 5 are pairs, and 2 have a margin; legal: all or none"):
        reward_model.main(dataclasses.replace(cfg, data=Data(files=(str(tmp_path / "mixed.jsonl"),), eval_size=2)))


@pytest.mark.parity
@pytest.mark.parametrize(("script", "rows"), [(sft, "demonstrations"), (reward_model, "pairs"), (dpo, "pairs")])
def test_transformers_loads_what_a_run_leaves(script, rows, root, tmp_path):
    """With the logits, or the scores, that this project computes."""
    torch = pytest.importorskip("torch", reason="torch is absent")
    import transformers

    script.main(config_of(root, script, rows, {}, tmp_path / "run"))
    directory = tmp_path / "run" / "model"
    is_reward_model = script is reward_model
    load = transformers.AutoModelForSequenceClassification if is_reward_model else transformers.AutoModelForCausalLM
    tokens = transformers.AutoTokenizer.from_pretrained(directory)("there was a cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = load.from_pretrained(directory, attn_implementation="eager")(tokens).logits.numpy()[0]
    config = hf.read_config(directory, reward_model=is_reward_model)
    params = hf.load(directory, config)
    ids = np.asarray(tokens)
    everywhere = np.ones(ids.shape, np.int32)
    hidden, _ = decoder.forward(config, params, ids, np.arange(ids.shape[1])[None], everywhere)
    if is_reward_model:
        ours = hidden[0, -1] @ hf.load_score_head(directory)
    else:
        ours = decoder.logits(config, params, hidden)[0]
    np.testing.assert_allclose(np.asarray(ours), theirs.squeeze(), rtol=0, atol=2e-5)
