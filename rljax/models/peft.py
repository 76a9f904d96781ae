"""Adapters in PEFT's format, in and out, without torch: adapter_config.json and adapter_model.safetensors.

    lora_A [r in] = Aᵀ    lora_B [out r] = Bᵀ    lora_magnitude_vector [out] = m

A tensor is called base_model.model.<module>.lora_A.weight, where <module>.weight is what the model's own directory
calls the weight (names as of peft 0.21). What PEFT would compute otherwise than `models.lora` is refused by name.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from rljax.models import decoder, hf, layout, lora
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import Lora
from rljax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STORED = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
MERGE = "merge the adapter into the model instead"
FUSED = f"Phi-3 stores these projections as one, whose adapter is another; {MERGE}"

LEGAL = {  # what must be one of these; PEFT's other ways of starting change the base
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
NUMBERS = ("r", "lora_alpha")
KNOWN = {  # the others say which tensors there are, which we see, or speak of training and provenance only
    *LEGAL,
    *NUMBERS,
    "use_rslora",
    "use_dora",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "velora_config",
}


def save_adapter(directory: str | Path, config: DecoderConfig, adapter: Params, base: str | Path) -> None:
    """A directory that peft loads: params["lora"] of a model whose `config.adapter` says what it is.

    base: the directory of the model that is adapted. Written beside and renamed at the end, so that there is never half
    a directory. Raises ValueError where `directory` already holds something, `adapter` is not config.adapter's, or what
    is adapted peft cannot say: Phi-3's fused projections, MLPs of a mixture.
    """
    made, leaves = config.adapter, flatten_dict(adapter)
    want, have = _shapes(made, config), {path: leaf.shape for path, leaf in leaves.items()}
    if want != have:
        differing = {"/".join(map(str, path)) for path, _ in want.items() ^ have.items()}
        raise ValueError(f"the adapter is not that of {made}: {layout.some(differing)} differ")
    modules = _modules(config, hf.is_fused(base))
    adapted = {path: modules[path] for path in lora.targets(made, decoder.abstract(config))}
    if fused := {module for module in adapted.values() if _last(module) in layout.FUSED}:
        raise ValueError(f"{layout.some(fused)}: {FUSED} (lora.merge, hf.save)")
    if config.experts and (dense := {module for path, module in adapted.items() if path[-2] == "mlp"}):
        raise ValueError(
            f"{layout.some(dense)}: peft takes any MLP of a mixture for its experts; {MERGE} (lora.merge, hf.save)"
        )
    short = _alike(adapted, config)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": made.rank,
        "lora_alpha": int(made.alpha) if made.alpha == int(made.alpha) else made.alpha,
        "use_rslora": made.rank_stabilised,
        "use_dora": made.decomposed,
        "target_modules": sorted({_last(module) if short else module for module in adapted.values()}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    stored = {_name(modules[path[:-1]], path[-1]): _stored(path, leaf) for path, leaf in leaves.items()}
    with layout.written_whole(directory) as place:
        (place / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
        save_file(stored, place / WEIGHTS, {"format": "pt"})


def load_adapter(directory: str | Path, config: DecoderConfig) -> tuple[Lora, Params]:
    """What an adapter is, for config.adapter, and its arrays, float32, for params["lora"]; `config` is the base's.

    The tensors say what is adapted. Dropout is not taken over. Raises FileNotFoundError without the two files,
    ValueError naming whatever PEFT would compute otherwise and every missing, unknown or misshapen tensor.
    """
    for name in (CONFIG, WEIGHTS):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"no adapter in {directory}: {name} is missing (pickled weights are not read)")
    raw = _read_config(Path(directory) / CONFIG)
    with safe_open(Path(directory) / WEIGHTS, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    modules = _modules(config, fused=False)
    found = (re.fullmatch(r"base_model\.model\.(.*)\.lora_\w+(\.weight)?", name) for name in tensors)
    there = {match[1] for match in found if match}
    if fused := {module for module in there if _last(module) in layout.FUSED}:
        raise ValueError(f"{directory}: {layout.some(fused)}: {FUSED} (peft: merge_and_unload)")

    adapted = [path for path, module in modules.items() if module in there]
    short = _alike(adapted, config)
    made = Lora(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        targets=tuple(dict.fromkeys("/".join(map(str, path[2:] if short else path)) for path in adapted)),
        rank_stabilised=raw["use_rslora"],
        decomposed=raw["use_dora"],
    )
    wanted = {_name(modules[path[:-1]], path[-1]): (path, shape) for path, shape in _shapes(made, config).items()}
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unknown or not adapted:
        legal = ", ".join(sorted({_last(m) for m in modules.values()}))
        raise ValueError(
            f"{directory}: tensors missing {layout.some(missing)}; not of this model's adapters "
            f"{layout.some(unknown)}; legal: {', '.join(STORED.values())} (with use_dora) of {legal}"
        )
    out = {}
    for name, (path, shape) in wanted.items():
        stored = _flat(path, shape)
        if tensors[name].shape != stored:
            raise ValueError(f"{directory}: {name} has shape {tensors[name].shape}; r and the model make it {stored}")
        out[path] = jnp.asarray(tensors[name].T.reshape(shape), jnp.float32)
    return made, unflatten_dict(out)


def _read_config(file: Path) -> dict:
    """Raises one ValueError for all that is not legal. A field that we do not know must be off."""
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    raw = {"bias": "none", "init_lora_weights": True, "use_rslora": False, "use_dora": False} | raw
    legal = {name: " or ".join(map(repr, values)) for name, values in LEGAL.items() if raw.get(name) not in values}
    positive = lambda x: isinstance(x, int | float) and x > 0  # noqa: E731
    legal |= {name: "a positive number" for name in NUMBERS if not positive(raw.get(name))}
    legal |= {name: "off (null, false, empty)" for name in sorted(raw.keys() - KNOWN) if raw[name]}
    wrong = [f"{name} is {raw.get(name)!r}, legal: {what}" for name, what in legal.items()]
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    return raw


def _modules(config: DecoderConfig, fused: bool) -> dict[tuple, str]:
    """Path of each weight that may be adapted -> the module that holds it."""
    pieces = layout.pieces(config, fused)
    paths = lora.adaptable(decoder.abstract(config)).values()
    return {path: pieces[path][0].name.removesuffix(".weight") for path in paths}


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _alike(adapted, config: DecoderConfig) -> bool:
    """All layers are adapted alike, so that a weight's name does without its layer."""
    return len(adapted) == config.layers * len({path[2:] for path in adapted})


def _shapes(made: Lora, config: DecoderConfig) -> dict[tuple, tuple]:
    shapes = jax.eval_shape(partial(lora.init, made), decoder.abstract(config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def _name(module: str, part: str) -> str:
    return f"base_model.model.{module}.{STORED[part]}"


def _flat(path: tuple, shape: tuple) -> tuple[int, ...]:
    """Shape of the stored tensor: [r in], [out r] or [out]."""
    if path[-1] == "magnitude":
        return (math.prod(shape),)
    return (shape[-1], math.prod(shape[:-1])) if path[-1] == "down" else (math.prod(shape[1:]), shape[0])


def _stored(path: tuple, leaf) -> np.ndarray:
    """Contiguous: safetensors 0.8.0 writes other arrays wrongly."""
    return np.ascontiguousarray(np.asarray(leaf).reshape(_flat(path, leaf.shape)[::-1]).T)
