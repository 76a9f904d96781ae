"""Tiny Llama directories made from a seed: random norms too, since ones would hide a wrong mapping."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Shapes that few models have: heads that do not fill the width, one shared key, more layers than a digit counts.
CASES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False},
    "plain": {"num_attention_heads": 3, "rope_theta": 100.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "deep": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 11},
}
BASE = {
    "architectures": ["LlamaForCausalLM"],
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
}


def config_of(case: str) -> dict:
    """config.json: `plain` has its rope in the old field, the others in the new one."""
    rope = {} if case == "plain" else {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    return BASE | rope | CASES[case]


def tensors_of(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the model, float32. The stream of RandomState is frozen; default_rng's may change with numpy."""
    random = np.random.RandomState(seed)
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

    def draw(shape):
        noise = random.standard_normal(shape)
        return 1 + 0.3 * noise if len(shape) == 1 else noise * 1.5 * shape[1] ** -0.5

    return {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}


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


def make(directory: Path, case: str) -> Path:
    config = config_of(case)
    return write(directory, config, tensors_of(config))


def tokens_of(case: str) -> list[np.ndarray]:
    """Two texts of different lengths."""
    random = np.random.RandomState(sorted(CASES).index(case) + 1)
    return [random.randint(0, BASE["vocab_size"], size) for size in (13, 6)]
