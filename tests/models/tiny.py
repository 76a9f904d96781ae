"""Tiny directories of every family, made from a seed: random norms and biases too, since ones and zeros would hide a
wrong mapping. Names and shapes of tensors are those that transformers itself writes (record.py)."""

import itertools
import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RECORDED = Path(__file__).parent / "recorded"
BASE = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def case(family: str, *parts: dict, **fields) -> dict:
    out = {"model_type": family}
    if family.startswith("gemma"):
        out |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 7, "tie_word_embeddings": True}
    for part in (*parts, fields):
        out |= part
    return BASE | out


def heads(count: int, kv_heads: int | None = None, head_dim: int | None = None) -> dict:
    fields = {"num_attention_heads": count, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return {name: value for name, value in fields.items() if value is not None}


def rope(theta: float = 500.0, kind: str = "default", **fields) -> dict:
    """As transformers 5 writes it."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **fields}}


def old_rope(theta: float, kind: str | None = None, name: str = "rope_type", **fields) -> dict:
    """As it stands in most files of the hub."""
    return {"rope_theta": theta, "rope_scaling": {name: kind, **fields} if kind else None}


def window(size: int | None, **fields) -> dict:
    return {"use_sliding_window": True, "sliding_window": size, **fields}


def experts(count: int, chosen: int, width: int, **fields) -> dict:
    return {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": width, **fields}


FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.4], "long_factor": [1.2, 2.0, 3.5, 7.0]}
TIED, BIASED, FLAT = {"tie_word_embeddings": True}, {"attention_bias": True}, {"use_sliding_window": False}

# Settings that few models have: heads that do not fill the width, one shared key, more layers than a digit counts,
# windows shorter than the texts, original contexts so short that a stretching shows within 13 tokens.
CASES = {
    "grouped": case("llama", heads(6, 2, 10), rope(), rms_norm_eps=0.1),
    "plain": case("llama", heads(3), TIED, rope_theta=100.0, rms_norm_eps=1e-6),
    "deep": case("llama", heads(4, 1, 4), rope(), num_hidden_layers=11, rms_norm_eps=0.1),
    "llama3": case("llama", heads(2, 1, 12), rope(50.0, "llama3", **LLAMA3), BIASED, mlp_bias=True),
    "llama_linear": case("llama", heads(8, 4, 6), old_rope(300.0, "linear", "type", factor=2.5), mlp_bias=True),
    "llama_yarn": case("llama", heads(4, 2), old_rope(100.0, "yarn", **YARN), BIASED),
    "smollm": case("llama", heads(9, 3), old_rope(1e5), TIED, hidden_size=36),
    "mistral": case("mistral", heads(4, 2, 10), old_rope(100.0), sliding_window=4),
    "mistral_full": case("mistral", heads(5, 1, 6), rope(), TIED, sliding_window=None),
    "mistral_yarn": case(
        "mistral",
        heads(3, 3, 14),
        rope(100.0, "yarn", attention_factor=0.7, beta_fast=8.0, beta_slow=2.0, **YARN),
        sliding_window=6,
    ),
    "mistral_types": case("mistral", heads(2, 1, 10), rope(), sliding_window=3, layer_types=[SLIDING, FULL, SLIDING]),
    "qwen2": case("qwen2", heads(4, 2), old_rope(1e3), FLAT, TIED, sliding_window=3, max_window_layers=1),
    "qwen2_windows": case("qwen2", heads(3, 1), rope(), window(5, max_window_layers=2)),
    "qwen2_yarn": case(
        "qwen2",
        heads(6, 3, 10),
        old_rope(50.0, "yarn", "type", **YARN),
        window(4, layer_types=[SLIDING, FULL, SLIDING]),
    ),
    "qwen3": case("qwen3", heads(4, 1, 10), rope(1e3), TIED),
    "qwen3_windows": case("qwen3", heads(6, 2, 6), old_rope(1e4), window(2, max_window_layers=1), BIASED),
    "qwen3_yarn": case(
        "qwen3", heads(2, 2, 16), rope(50.0, "yarn", mscale=1.5, mscale_all_dim=0.5, truncate=False, **YARN), FLAT
    ),
    "moe": case("qwen3_moe", heads(4, 2, 10), old_rope(1e3), experts(5, 2, 12, norm_topk_prob=True)),
    "moe_mixed": case(
        "qwen3_moe",
        heads(6, 1, 8),
        rope(),
        experts(7, 3, 8, decoder_sparse_step=2, mlp_only_layers=[3]),
        TIED,
        BIASED,
        num_hidden_layers=6,
    ),
    "moe_yarn": case(
        "qwen3_moe",
        heads(2, 1),
        rope(100.0, "yarn", truncate=False, **YARN),
        experts(4, 1, 28, mlp_only_layers=[0], norm_topk_prob=False),
        window(4),
    ),
    "gemma2": case(
        "gemma2",
        heads(4, 2, 10),
        old_rope(1e3),
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2_uncapped": case(
        "gemma2",
        heads(3, 1, 8),
        rope(),
        BIASED,
        sliding_window=3,
        layer_types=[FULL, SLIDING, SLIDING],
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    ),
    "gemma2_linear": case(
        "gemma2",
        heads(6, 6, 4),
        old_rope(100.0, "linear", factor=3.0),
        sliding_window=12,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=None,
    ),
    "gemma3": case(
        "gemma3_text",
        heads(4, 2, 10),
        old_rope(100.0, "linear", factor=4.0),
        rope_local_base_freq=50.0,
        sliding_window=4,
        sliding_window_pattern=3,
    ),
    "gemma3_pattern": case("gemma3_text", heads(4, 1, 6), old_rope(300.0), sliding_window=3, num_hidden_layers=7),
    "gemma3_nested": case(
        "gemma3_text",
        heads(3, 3, 12),
        {
            "rope_parameters": {
                FULL: {"rope_theta": 10.0, "rope_type": "yarn", **YARN},
                SLIDING: {"rope_theta": 20.0, "rope_type": "linear", "factor": 2.0},
            }
        },
        BIASED,
        layer_types=[FULL, SLIDING, FULL],
        sliding_window=6,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=4.0,
        tie_word_embeddings=False,
    ),
    "smollm3": case(
        "smollm3",
        heads(4, 1),
        old_rope(5e3),
        FLAT,
        TIED,
        no_rope_layers=[1, 0, 1],
        layer_types=[FULL, FULL, SLIDING],
        sliding_window=5,
    ),
    "smollm3_windows": case("smollm3", heads(6, 2), rope(), window(4, no_rope_layer_interval=2), BIASED, mlp_bias=True),
    "smollm3_yarn": case("smollm3", heads(3, 3, 10), rope(100.0, "yarn", **YARN), no_rope_layers=[0, 1, 1, 0, 1]),
    "olmo2": case("olmo2", heads(4), old_rope(1e3)),
    "olmo2_grouped": case("olmo2", heads(6, 2), rope(), BIASED, TIED),
    "olmo2_yarn": case("olmo2", heads(4, 1, 10), rope(100.0, "yarn", attention_factor=1.0, **YARN)),
    "phi3": case("phi3", heads(4, 2), rope_theta=1e4, sliding_window=5),
    "phi3_short": case(
        "phi3",
        heads(3, 1),
        old_rope(50.0, "longrope", "type", **LONG),
        original_max_position_embeddings=16,
        rms_norm_eps=0.1,
    ),
    "phi3_long": case(
        "phi3",
        heads(2, 2),
        rope(50.0, "longrope", partial_rotary_factor=0.67, attention_factor=1.3, **LONG),
        TIED,
        original_max_position_embeddings=4,
    ),
    "phi3_partial": case("phi3", heads(4, 4, 10), old_rope(1e4), partial_rotary_factor=0.5),
}


def config_of(name: str) -> dict:
    """config.json of a case."""
    return dict(CASES[name])


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the case as transformers stores it. In shapes.json one entry stands for tensors that differ in
    numbers only: #s in their name, and for each the numbers it is."""
    out = {}
    for pattern, (shape, *numbers) in json.loads((RECORDED / "shapes.json").read_text())[name].items():
        for chosen in itertools.product(*numbers):
            out[pattern.replace("#", "{}").format(*chosen)] = tuple(shape)
    return out


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama without biases: for configs that no case has."""
    D, F, V, H = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    K, KV = config.get("head_dim") or D // H, config.get("num_key_value_heads") or H
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (H * K, D),
            "self_attn.k_proj": (KV * K, D),
            "self_attn.v_proj": (KV * K, D),
            "self_attn.o_proj": (D, H * K),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def tensors_of(config: dict, shapes: dict | None = None) -> dict[str, np.ndarray]:
    """Random tensors, float32. The stream of RandomState is frozen; default_rng's may change with numpy."""
    random, one = np.random.RandomState(0), 0 if config["model_type"].startswith("gemma") else 1

    def draw(name, shape):
        noise = random.standard_normal(shape)
        if len(shape) == 2:
            return noise * 1.5 * shape[1] ** -0.5
        return 0.3 * noise + (0 if name.endswith(".bias") else one)

    shapes = llama_shapes(config) if shapes is None else shapes
    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def write(directory: Path, config: dict, tensors: dict[str, np.ndarray], files: int = 1) -> Path:
    """A model directory. safetensors 0.8.0 writes arrays that are not contiguous wrongly."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    for i in range(files):
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[i::files]}
        suffix = "" if files == 1 else f"-{i + 1:05d}-of-{files:05d}"
        save_file(part, directory / f"model{suffix}.safetensors", metadata={"format": "pt"})
    if files > 1:
        where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def make(directory: Path, name: str) -> Path:
    return write(directory, config_of(name), tensors_of(config_of(name), shapes_of(name)))


def tokens_of(name: str) -> list[np.ndarray]:
    """Two texts of different lengths."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return [random.randint(0, BASE["vocab_size"], size) for size in (13, 6)]
