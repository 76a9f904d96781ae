"""The recipe for a slice, end to end on a tiny Qwen2 of random weights and real prompts of GSM8K."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import gsm8k_grpo
from experiments.common.settings import Batches, Sampling
from experiments.tools import tiny_model
from rljax.data.examples import prompt_ids
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.main(tiny_model.Config(str(out), texts=str(shared / "data" / "gsm8k_test.jsonl"), width=32, layers=1))
    return out


@pytest.mark.nightly
def test_it_runs_from_the_prompts_to_a_model(model, shared, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join((shared / "data" / "gsm8k_train.jsonl").read_bytes().splitlines(True)[:32]))
    cfg = gsm8k_grpo.Config(
        model=str(model),
        prompts=str(prompts),
        steps=1,
        batches=Batches(prompts=8, num_generations=2),
        sampling=Sampling(max_tokens=8),
        eval_prompts=8,
        eval_samples=8,
        eval_every=0,
        log_samples_every=1,
        directory=str(tmp_path / "run"),
    )
    reached = gsm8k_grpo.main(cfg)
    assert 0 <= reached["after"]["reward"] <= 1.1
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"reward", "reward/number", "reward/boxed", "kl_sequence", "grad_norm"} <= set(json.loads(line))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == f"user\n{gsm8k_grpo.TEMPLATE.format(**sample['columns'])}\nassistant\n"
    trained = hf.load(tmp_path / "run" / "model", hf.read_config(tmp_path / "run" / "model"))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))


def test_its_prompt_is_a_turn_of_the_users(model):
    tokenizer = load_tokenizer(model)
    text = gsm8k_grpo.TEMPLATE.format(question="2 + 2?")
    ids = prompt_ids({"prompt": [{"role": "user", "content": text}]}, tokenizer)
    assert tokenizer.decode_all(ids) == (
        "<|im_start|>user\n2 + 2?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.stop == (tokenizer.encode_more("<|im_end|>")[0],)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"so it is \boxed{72}", 1),
        (r"so it is $\boxed{72}$." + "\n", 1),
        (r"\[ \boxed{7 2} \]", 1),
        (r"\boxed{72} clips, and then", 0),
        (r"so it is \boxed{72", 0),
        (r"so it is \boxed{}", 0),
        ("72", 0),
    ],
)
def test_a_box_counts_at_the_end(completion, score):
    assert gsm8k_grpo.boxed(completion) == score


def test_it_is_grpo_with_other_settings():
    """Every setting that is its own is one that grpo.py reads."""
    own = {field.name for field in dataclasses.fields(gsm8k_grpo.Config)}
    assert own == {field.name for field in dataclasses.fields(gsm8k_grpo.grpo.Config)}
    cfg = gsm8k_grpo.Config()
    assert cfg.batches.prompts * cfg.batches.num_generations % (16 * cfg.batches.minibatches) == 0


def test_the_tokenizer_of_a_tiny_model_is_learned_from_messages_too(tmp_path):
    file = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "aaaa aaaa"}, {"role": "assistant", "content": "bbbb bbbb"}]}
    file.write_text(json.dumps(row) + "\n")
    tiny_model.main(tiny_model.Config(str(tmp_path / "out"), texts=str(file), width=32, layers=1))
    assert load_tokenizer(tmp_path / "out").size > 256 + len(tiny_model.SPECIAL)
    file.write_text(json.dumps({"n": 1}) + "\n")
    with pytest.raises(ValueError, match=r"no text in .*chats.jsonl; legal: a file with a column of texts"):
        tiny_model.main(tiny_model.Config(str(tmp_path / "other"), texts=str(file)))


def test_a_tiny_model_is_written_once(model, tmp_path):
    out = tmp_path / "qwen3"
    tiny_model.main(tiny_model.Config(str(out), family="qwen3", width=32, layers=1))
    config = hf.read_config(out)
    assert config.qk_norm == "head"
    assert config.vocab_size == load_tokenizer(out).size == 256 + len(tiny_model.SPECIAL)  # no texts: bytes
    assert set(hf.load(out, config)) == set(decoder.abstract(config))
    before = {path: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(ValueError, match=r"is not empty; legal: a directory that does not exist yet"):
        tiny_model.main(tiny_model.Config(str(model)))
    assert {path: path.read_bytes() for path in model.iterdir()} == before
