"""config.json -> DecoderConfig. A family is what it does differently from a Llama: one short function each.

transformers' own config classes fill in what a file leaves out and bring old fields into their new form, so a file from
the hub and one saved yesterday mean the same. What this decoder would compute wrongly is refused by name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rljax.models import rope
from rljax.models.decoder import DecoderConfig
from rljax.models.moe import Experts

NUMBERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_config(directory: str | Path, context: int | None = None, reward_model: bool = False) -> DecoderConfig:
    """The decoder's shape from `config.json`. Raises ValueError on anything this decoder would compute wrongly.

    reward_model: a sequence classifier is read, whose table of logits is not there; else it is refused.
    context: the longest text there will be, for the models whose positions depend on it (longrope: Phi-3 of 128 k);
    None: texts no longer than the context that the model was first trained on.
    """
    file = Path(directory) / "config.json"
    raw = read_raw(directory)
    if _scores(raw) and not reward_model:
        raise ValueError(f"{file}: {raw['architectures'][0]} is a reward model and writes no text")
    family = raw.get("model_type")
    _require(file, "model_type", family, tuple(FAMILIES))
    _require(file, "quantization_config", raw.get("quantization_config"), (None,))
    for p in _each_rope(raw.get("rope_parameters") or raw.get("rope_scaling") or {}):
        _require(file, "rope_type", p.get("rope_type", p.get("type", "default")), ROPES)
    if absent := [name for name in NUMBERS if name not in raw]:
        raise ValueError(f"{file} lacks {', '.join(absent)}; a decoder needs {', '.join(NUMBERS)}")
    c = _filled(file, raw)
    activation = getattr(c, "hidden_activation", None) or c.hidden_act
    _require(file, "hidden_act", activation, tuple(ACTIVATIONS))
    _require(file, "use_bidirectional_attention", getattr(c, "use_bidirectional_attention", None), (None, False))
    if family != "phi3":  # transformers rotates whole heads of the others, whatever the file says
        for p in _each_rope(c.rope_parameters):
            _require(file, "partial_rotary_factor", p.get("partial_rotary_factor"), (None, 1.0))
    if c.num_attention_heads % c.num_key_value_heads:
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        raise ValueError(f"{file}: num_key_value_heads is {kv_heads}; legal: a divisor of {heads}")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return DecoderConfig(
        vocabulary=c.vocab_size,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        mlp_width=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        norm_epsilon=c.rms_norm_eps,
        tied=c.tie_word_embeddings or _scores(raw),
        activation=ACTIVATIONS[activation],
        ropes=_ropes(c, head_dim, context),
        **FAMILIES[family](c),
    )


def read_raw(directory: str | Path) -> dict:
    """config.json as it stands. Raises FileNotFoundError or ValueError, saying what a model directory holds."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {directory}: config.json is missing (a Hugging Face model directory holds it)"
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _scores(raw: dict) -> bool:
    """Whether it is a reward model, which has no table of logits of its own."""
    return any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or [])


def _filled(file: Path, raw: dict):
    """transformers' config: defaults filled in, old fields renewed."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING  # a second of import: only where it is needed

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (ValueError, KeyError, TypeError, IndexError, StrictDataclassError) as error:
        raise ValueError(f"{file}: transformers refuses it: {error}") from None


def _require(file: Path, name: str, value, legal: tuple) -> None:
    if value not in legal:
        raise ValueError(f"{file}: {name} is {value!r}; legal: {', '.join(map(repr, legal))}")


def _each_rope(parameters: dict) -> list[dict]:
    """One for each kind of layer, or the one of all."""
    return [p for p in parameters.values() if isinstance(p, dict)] or [parameters]


def _ropes(c, head_dim: int, context: int | None) -> tuple[rope.Rope, ...]:
    parameters = c.rope_parameters
    table = lambda p: rope.from_parameters(p, head_dim, c.max_position_embeddings, context)  # noqa: E731
    if "rope_theta" in parameters:
        used = getattr(c, "no_rope_layers", None) or (1,) * c.num_hidden_layers  # a name that means its contrary
        return tuple(table(parameters) if turned else None for turned in used[: c.num_hidden_layers])
    by_kind = {kind: table(p) for kind, p in parameters.items() if p}
    return tuple(by_kind[kind] for kind in c.layer_types)


def _windows(c) -> tuple[int | None, ...]:
    """Only the layers called sliding have one."""
    if other := set(c.layer_types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types has {sorted(other)}; legal: 'sliding_attention', 'full_attention'")
    return tuple(c.sliding_window if kind == "sliding_attention" else None for kind in c.layer_types)


def _one_window(c) -> tuple[int | None, ...]:
    return (c.sliding_window,) * c.num_hidden_layers


# ------------------------------------------------------------------------------------------------------------ families


def _llama(c) -> dict[str, Any]:  # SmolLM 1 and 2 too
    return {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def _mistral(c) -> dict[str, Any]:
    """With layer_types it is what transformers has come to call Ministral."""
    return {"windows": _windows(c) if getattr(c, "layer_types", None) else _one_window(c)}


def _qwen2(c) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows(c)}


def _qwen3(c) -> dict[str, Any]:
    bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
    return bias | {"qk_norm": "head", "windows": _windows(c)}


def _qwen3_moe(c) -> dict[str, Any]:
    sparse = lambda i: i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0  # noqa: E731
    layers = tuple(i for i in range(c.num_hidden_layers) if sparse(i))
    experts = Experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, layers, c.norm_topk_prob)
    bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
    windows = _one_window(c) if c.use_sliding_window else ()
    return bias | {"qk_norm": "head", "windows": windows, "experts": experts if layers else None}


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
    return {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias, "norms": "after", "qk_norm": "whole"}


def _phi3(c) -> dict[str, Any]:
    return {"windows": _one_window(c)}


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
