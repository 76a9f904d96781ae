"""Each family at the sizes of a model that people use, in as few layers as show every kind of layer it has, random
weights, at positions up to the end of its context: rljax against transformers. Needs torch and 20 GB of memory.

pytest -m nightly tests/models/test_true_size.py
"""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tiny
from rljax.models import decoder, hf

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(36_000)]
TOLERANCE = 2e-5  # relative to the standard deviation of the logits at a position, at least 1
ROUNDING = 1e-6  # relative to the logit: Gemma's own token has 41, a float32 sum of 3,840 squares
TOKENS = 24


def model(family: str, vocabulary: int, sizes: tuple[int, int, int], context: int, *parts: dict, **fields) -> dict:
    """As on the hub. sizes: width, width of the MLP, layers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    out = {"model_type": family, **dict(zip(names, (vocabulary, *sizes, context), strict=True))}
    for part in (*parts, fields):
        out |= part
    return {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"} | out


heads, rope, FULL, SLIDING = tiny.heads, tiny.old_rope, tiny.FULL, tiny.SLIDING
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
LLAMA3 = tiny.LLAMA3 | {"original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {  # growing as Phi-3's do
    "short_factor": np.linspace(1.0, 2.9, 48).round(2).tolist(),
    "long_factor": np.geomspace(1.0, 64.0, 48).round(2).tolist(),
}
MODELS = {
    "Llama-3.1-8B": model(
        "llama", 128256, (4096, 14336, 1), 131072, heads(32, 8), rope(5e5, "llama3", **LLAMA3), rms_norm_eps=1e-5
    ),
    "Mistral-7B-v0.1": model(
        "mistral", 32000, (4096, 14336, 1), 32768, heads(32, 8), rope(1e4), sliding_window=4096, rms_norm_eps=1e-5
    ),
    "Qwen2.5-7B": model(
        "qwen2", 152064, (3584, 18944, 1), 131072, heads(28, 4), rope(1e6, "yarn", "type", **YARN), tiny.FLAT
    ),
    "Qwen3-8B": model("qwen3", 151936, (4096, 12288, 1), 40960, heads(32, 8, 128), rope(1e6)),
    "Qwen3-30B-A3B": model(
        "qwen3_moe",
        151936,
        (2048, 6144, 1),
        40960,
        heads(32, 4, 128),
        rope(1e6),
        tiny.experts(128, 8, 768, norm_topk_prob=True),
    ),
    "Gemma-2-9B": model(
        "gemma2",
        256000,
        (3584, 14336, 2),
        8192,
        heads(16, 8, 256),
        GELU,
        rope_theta=1e4,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "Gemma-3-12B": model(
        "gemma3_text",
        262208,
        (3840, 15360, 2),
        131072,
        heads(16, 8, 256),
        GELU,
        rope(1e6, "linear", factor=8.0),
        rope_local_base_freq=1e4,
        sliding_window=1024,
        layer_types=[SLIDING, FULL],
        query_pre_attn_scalar=256,
    ),
    "SmolLM3-3B": model(
        "smollm3",
        128256,
        (2048, 11008, 2),
        65536,
        heads(16, 4),
        rope(5e6),
        tiny.FLAT,
        tiny.TIED,
        no_rope_layers=[1, 0],
    ),
    "OLMo-2-7B": model("olmo2", 100352, (4096, 11008, 1), 4096, heads(32, 32), rope(5e5)),
    "Phi-3-mini-128k": model(
        "phi3",
        32064,
        (3072, 8192, 1),
        131072,
        heads(32, 32),
        rope(1e4, "longrope", "type", **LONG),
        rms_norm_eps=1e-5,
        sliding_window=262144,
        original_max_position_embeddings=4096,
    ),
}


def positions_of(raw: dict) -> np.ndarray:
    """At both ends of the context and in its middle; only at its end where there is a window, which transformers
    counts in columns."""
    context = raw["max_position_embeddings"]
    if (raw.get("sliding_window") or context) < context:
        return np.arange(context - TOKENS, context)
    each = TOKENS // 3
    return np.concatenate([np.arange(each) + start for start in (0, context // 2, context - each)])


def take_our_frequencies(rotary, config: decoder.DecoderConfig, raw: dict, positions) -> None:
    """They are the same but for the last bits of one in 64, where torch's float32 power is not rounded correctly. At
    position 65,536 one bit turns a pair by 6e-5 radians."""
    import torch

    kinds = {kind: config.ropes[i] for i, kind in enumerate(raw["layer_types"])} if "layer_types" in raw else {}
    for kind, table in kinds.items() or [(None, config.ropes[0])]:
        rotary(positions, positions, *([kind] if kind else []))  # longrope chooses its table
        ours, prefix = torch.tensor(table.frequencies), f"{kind}_" if kind else ""
        np.testing.assert_allclose(getattr(rotary, f"{prefix}inv_freq"), ours, rtol=2.5e-7, atol=0)
        for name in ("inv_freq", "original_inv_freq", "long_inv_freq"):
            setattr(rotary, prefix + name, ours.clone())


def transformers_writes_and_says(directory, config: decoder.DecoderConfig, raw: dict, ids, positions) -> np.ndarray:
    """Logits of a random model, norms and biases random too, which is then stored in the directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    about = AutoConfig.from_pretrained(directory)
    made = AutoModelForCausalLM.from_config(about, attn_implementation="eager", dtype=torch.float32).eval()
    take_our_frequencies(made.model.rotary_emb, config, raw, torch.tensor(positions[None]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            parameter.copy_(parameter.bfloat16())  # as it will be stored
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": np.ones_like(ids)}
        logits = made(**{name: torch.tensor(x[None]) for name, x in inputs.items()}).logits[0].numpy()
    made.bfloat16().save_pretrained(directory, max_shard_size="1GB")
    (directory / "config.json").write_text(json.dumps(raw))
    return logits


@pytest.fixture
def directory(tmp_path):
    """Gone after the test: it will hold gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_true_sizes(name, directory):
    pytest.importorskip("torch", reason="torch is absent")
    raw, positions = MODELS[name], positions_of(MODELS[name])
    ids = np.random.RandomState(0).randint(0, raw["vocab_size"], TOKENS)
    (directory / "config.json").write_text(json.dumps(raw))
    config = hf.read_config(directory, context=int(positions.max()) + 1)
    want = transformers_writes_and_says(directory, config, raw, ids, positions)
    gc.collect()
    params = hf.load(directory, config)

    @jax.jit
    def logits(params, *places):
        return decoder.logits(config, params, decoder.forward(config, params, *places)[0])

    places = (jnp.asarray(x[None], jnp.int32) for x in (ids, positions, np.ones_like(ids)))
    got = np.asarray(logits(params, *places)[0])
    allowed = TOLERANCE * np.maximum(want.std(axis=1, keepdims=True), 1.0) + ROUNDING * np.abs(want)
    assert (np.abs(got - want) / allowed).max() <= 1
