"""config.json -> DecoderConfig: for each model family a short function with what differs from a Llama.

transformers' own config classes fill in what a file leaves out and convert old fields to new ones, so that old files
and new ones mean the same. What this decoder would compute wrongly is refused by name.
"""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rljax.models import rope
from rljax.models.decoder import DecoderConfig
from rljax.models.moe import MoEConfig
from rljax.models.stored import EMBEDDING, HEAD, are_equal, holds_tensors, read_object, stored_files

REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
HF_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_config(directory: str | Path, context: int | None = None, reward_model: bool = False) -> DecoderConfig:
    """The decoder's config from `config.json`. Raises ValueError on anything this decoder would compute wrongly.

    Where it says tied and the files hold an output head with other values than the embedding, the head is used, with a
    warning, as transformers 5 does (`PreTrainedModel.tie_weights`).

    Args:
      context: length of the longest text, for the models whose positions depend on it (longrope: Phi-3 of 128 k); None:
      at most the context length that the model was first trained on.
      reward_model: read a sequence classifier, which has no table of logits; without it one is refused.
    """
    file = Path(directory) / "config.json"
    raw = read_raw(directory)
    if _is_classifier(raw) and not reward_model:
        raise ValueError(f"{file}: {raw['architectures'][0]} is a reward model and writes no text")
    family = raw.get("model_type")
    _require(file, "model_type", family, tuple(FAMILIES))
    _require(file, "quantization_config", raw.get("quantization_config"), (None,))
    for rope_fields in _each_rope(raw.get("rope_parameters") or raw.get("rope_scaling") or {}):
        _require(file, "rope_type", rope_fields.get("rope_type", rope_fields.get("type", "default")), ROPE_TYPES)
    absent = [name for name in REQUIRED_FIELDS if name not in raw]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; a decoder needs {', '.join(REQUIRED_FIELDS)}")
    c = _hf_config(file, raw)
    activation = getattr(c, "hidden_activation", None) or c.hidden_act
    _check_fields(file, c, family, activation)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    own_head = c.tie_word_embeddings and _stores_own_head(directory, raw)
    if own_head:
        warnings.warn(
            f"{file} says that the output head is tied to the embedding, but {HEAD} is stored with other values: they "
            "are not tied; tie_word_embeddings = false in config.json silences this warning",
            stacklevel=2,
        )
    return DecoderConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=_is_classifier(raw) or (c.tie_word_embeddings and not own_head),
        activation=HF_ACTIVATIONS[activation],
        ropes=_ropes(c, head_dim, context),
        **FAMILIES[family](c),
    )


def _check_fields(file: Path, c, family: str, activation: str) -> None:
    """Raises ValueError for fields of transformers' config that this decoder has no counterpart of."""
    _require(file, "hidden_act", activation, tuple(HF_ACTIVATIONS))
    _require(file, "use_bidirectional_attention", getattr(c, "use_bidirectional_attention", None), (None, False))
    if family != "phi3":  # in the other families transformers rotates whole heads, whatever the file says
        for rope_fields in _each_rope(c.rope_parameters):
            _require(file, "partial_rotary_factor", rope_fields.get("partial_rotary_factor"), (None, 1.0))
    if c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(
            f"{file}: num_key_value_heads is {c.num_key_value_heads}; legal: a divisor of {c.num_attention_heads}"
        )


def read_raw(directory: str | Path) -> dict:
    """config.json as a dict. Raises FileNotFoundError or ValueError, saying what a model directory holds."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {directory}: config.json is missing (a Hugging Face model directory holds it)"
        )
    return read_object(file)


def longrope_limit(directory: str | Path) -> int | None:
    """Tokens of the longest text for which longrope has its table of short ones, which is that of `read_config` without
    a context; None for a model of one table."""
    c = _hf_config(Path(directory) / "config.json", read_raw(directory))
    ropes = [fields for fields in _each_rope(c.rope_parameters) if fields.get("rope_type") == "longrope"]
    return min((fields["original_max_position_embeddings"] for fields in ropes), default=None)


def _is_classifier(raw: dict) -> bool:
    """Whether it is a reward model, which has no table of logits of its own."""
    return any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or [])


def has_own_head(directory: str | Path) -> bool:
    """Whether config.json says tied while the files hold an output head with other values than the embedding."""
    raw = read_raw(directory)
    if raw.get("model_type") not in FAMILIES or not holds_tensors(Path(directory)):
        return False
    return _hf_config(Path(directory) / "config.json", raw).tie_word_embeddings and _stores_own_head(directory, raw)


def _stores_own_head(directory: str | Path, raw: dict) -> bool:
    """Whether the files of a language model hold an output head with other values than the embedding."""
    directory = Path(directory)
    if _is_classifier(raw) or not holds_tensors(directory):
        return False
    files = stored_files(directory)
    return {EMBEDDING, HEAD} <= files.keys() and not are_equal(files, EMBEDDING, HEAD)


def _hf_config(file: Path, raw: dict):
    """transformers' config: defaults filled in, old fields converted."""
    from huggingface_hub.errors import StrictDataclassError

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice to install torch, which is not needed
    from transformers import CONFIG_MAPPING  # importing it takes a second, so only where it is needed

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (ValueError, KeyError, TypeError, IndexError, StrictDataclassError) as error:
        raise ValueError(f"{file}: transformers refuses it: {error}") from None


def _require(file: Path, name: str, value, legal: tuple) -> None:
    if value not in legal:
        raise ValueError(f"{file}: {name} is {value!r}; legal: {', '.join(map(repr, legal))}")


def _each_rope(parameters: dict) -> list[dict]:
    """The rope fields of each kind of layer, or the one set that all layers share."""
    by_kind = [fields for fields in parameters.values() if isinstance(fields, dict)]
    return by_kind or [parameters]


def _ropes(c, head_dim: int, context: int | None) -> tuple[rope.Rope | None, ...]:
    """The table of each layer, None where it has no positions."""

    def table_of(fields: dict) -> rope.Rope:
        return rope.from_parameters(fields, head_dim, c.max_position_embeddings, context)

    parameters = c.rope_parameters
    if "rope_theta" in parameters:
        # Despite its name, no_rope_layers has 1 for the layers that do have rotary positions.
        has_rope = getattr(c, "no_rope_layers", None) or (1,) * c.num_hidden_layers
        table = table_of(parameters)
        return tuple(table if used else None for used in has_rope[: c.num_hidden_layers])
    by_kind = {kind: table_of(fields) for kind, fields in parameters.items() if fields}
    return tuple(by_kind[kind] for kind in c.layer_types)


def _windows(c) -> tuple[int | None, ...]:
    """The sliding window of the layers of that type; None for the others."""
    other = set(c.layer_types) - {"sliding_attention", "full_attention"}
    if other:
        raise ValueError(f"layer_types has {sorted(other)}; legal: 'sliding_attention', 'full_attention'")
    return tuple(c.sliding_window if kind == "sliding_attention" else None for kind in c.layer_types)


def _same_window(c) -> tuple[int | None, ...]:
    return (c.sliding_window,) * c.num_hidden_layers


# ------------------------------------------------------------------------------------------------------------ families


def _llama(c) -> dict[str, Any]:  # SmolLM 1 and 2 too
    return {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def _mistral(c) -> dict[str, Any]:
    """With layer_types it is what transformers calls Ministral."""
    return {"windows": _windows(c) if getattr(c, "layer_types", None) else _same_window(c)}


def _qwen2(c) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows(c)}


def _qwen3(c) -> dict[str, Any]:
    return {
        "qkv_bias": c.attention_bias,
        "out_bias": c.attention_bias,
        "qk_norm": "head",
        "windows": _windows(c),
    }


def _qwen3_moe(c) -> dict[str, Any]:
    moe_layers = tuple(
        layer
        for layer in range(c.num_hidden_layers)
        if layer not in c.mlp_only_layers and (layer + 1) % c.decoder_sparse_step == 0
    )
    moe = MoEConfig(
        num_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        intermediate_size=c.moe_intermediate_size,
        layers=moe_layers,
        norm_topk_prob=c.norm_topk_prob,
    )
    return {
        "qkv_bias": c.attention_bias,
        "out_bias": c.attention_bias,
        "qk_norm": "head",
        "windows": _same_window(c) if c.use_sliding_window else (),
        "moe": moe if moe_layers else None,
    }


def _gemma2(c) -> dict[str, Any]:
    return {
        "qkv_bias": c.attention_bias,
        "out_bias": c.attention_bias,
        "norms": "both",
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(c.hidden_size),
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "logit_softcap": c.final_logit_softcapping,
        "windows": _windows(c),
    }


def _gemma3(c) -> dict[str, Any]:
    """transformers' config has attn_logit_softcapping; its attention does not apply it."""
    return _gemma2(c) | {"qk_norm": "head", "attention_softcap": None}


def _smollm3(c) -> dict[str, Any]:
    return _llama(c) | {"windows": _windows(c)}


def _olmo2(c) -> dict[str, Any]:
    return {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias, "norms": "post", "qk_norm": "full"}


def _phi3(c) -> dict[str, Any]:
    return {"windows": _same_window(c)}


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "phi3": _phi3,
}
