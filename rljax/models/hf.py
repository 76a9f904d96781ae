"""Read a Hugging Face model directory (config.json, *.safetensors) without torch.

Tensors are read one by one, by name, in numpy; what the directory holds but the family does not know, or the other way
round, is an error, never a guess.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.types import Params

FAMILIES = ("llama",)
NUMBERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def read_config(directory: str | Path, remat: str = "none") -> DecoderConfig:
    """The decoder's shape from `config.json`. Raises ValueError on anything this decoder would compute wrongly."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {directory}: config.json is missing (a Hugging Face model directory holds it)"
        )
    try:
        raw = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'} is not JSON: {error}") from None
    _refuse(directory, raw)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return DecoderConfig(
        vocabulary=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        mlp_width=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        norm_epsilon=raw["rms_norm_eps"],
        tied=raw.get("tie_word_embeddings", False),
        remat=remat,
    )


def _refuse(directory: Path, raw: dict) -> None:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    found = {
        "model_type": (raw.get("model_type"), FAMILIES),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (raw.get("attention_bias", False), (False,)),
        "mlp_bias": (raw.get("mlp_bias", False), (False,)),
        "quantization_config": (raw.get("quantization_config"), (None,)),
    }
    for name, (value, legal) in found.items():
        if value not in legal:
            raise ValueError(f"{directory / 'config.json'}: {name} is {value!r}; legal: {', '.join(map(repr, legal))}")
    if absent := [name for name in NUMBERS if name not in raw]:
        raise ValueError(f"{directory / 'config.json'} lacks {', '.join(absent)}; a decoder needs {', '.join(NUMBERS)}")
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or 1
    if heads % kv_heads:
        raise ValueError(f"{directory / 'config.json'}: num_key_value_heads is {kv_heads}; legal: a divisor of {heads}")


def load(directory: str | Path, config: DecoderConfig, shardings: Params | None = None, dtype=jnp.float32) -> Params:
    """Parameters of the decoder from the directory's safetensors, straight into `shardings` (one per parameter).

    Raises FileNotFoundError without a safetensors file, ValueError naming every missing, unknown or misshapen tensor.
    """
    files = _tensor_files(Path(directory))
    names = _names(config)
    unknown = {n for n in files if not n.endswith("rotary_emb.inv_freq")} - set(names.values())
    if config.tied:
        unknown -= {"lm_head.weight"}
    missing = set(names.values()) - set(files)
    if missing or unknown:
        raise ValueError(f"{directory}: tensors missing {_some(missing)}; not of this family {_some(unknown)}")

    def read(path, leaf, sharding=None):
        name = names[path]
        with safe_open(files[name], framework="numpy") as opened:
            tensor = opened.get_tensor(name)
        stored = _stored_shape(path, leaf.shape)
        if tensor.shape != stored:
            raise ValueError(f"{directory}: {name} has shape {tensor.shape}; config.json makes it {stored}")
        tensor = tensor if path[-1] in _KEPT else tensor.T
        tensor = np.ascontiguousarray(tensor).reshape(leaf.shape).astype(dtype)
        return jax.device_put(tensor, sharding)

    shapes = decoder.abstract(config)
    trees = (shapes,) if shardings is None else (shapes, shardings)
    return jax.tree.map_with_path(lambda path, *leaves: read(tuple(k.key for k in path), *leaves), *trees)


_KEPT = ("embedding", "scale")  # stored as they are; matrices are [out, in] there and [in, out] here


def _stored_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] in _KEPT:
        return shape
    inputs = 2 if path[-1] == "out" else 1  # leading axes of ours that are the matrix's input
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _names(config: DecoderConfig) -> dict[tuple, str]:
    """Path of each of our parameters -> the tensor's name in the directory."""
    inner = {
        ("attention_norm", "scale"): "input_layernorm",
        ("attention", "query"): "self_attn.q_proj",
        ("attention", "key"): "self_attn.k_proj",
        ("attention", "value"): "self_attn.v_proj",
        ("attention", "out"): "self_attn.o_proj",
        ("mlp_norm", "scale"): "post_attention_layernorm",
        ("mlp", "gate"): "mlp.gate_proj",
        ("mlp", "up"): "mlp.up_proj",
        ("mlp", "down"): "mlp.down_proj",
    }
    names = {("embedding",): "model.embed_tokens.weight", ("norm", "scale"): "model.norm.weight"}
    if not config.tied:
        names["head",] = "lm_head.weight"
    for i in range(config.layers):
        names |= {("layers", i, *path): f"model.layers.{i}.{name}.weight" for path, name in inner.items()}
    return names


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Name of each stored tensor -> the file that holds it."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}; pickled weights (.bin, .pt) are not read")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                found |= {name: file for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from None
    return found


def _some(names: set[str]) -> str:
    """At most four of the names, for an error."""
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") if shown else "none"
