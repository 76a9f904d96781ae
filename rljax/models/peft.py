"""Adapters in PEFT's format, read and written without torch: adapter_config.json and adapter_model.safetensors.

    lora_A [r in] = Aᵀ    lora_B [out r] = Bᵀ    lora_magnitude_vector [out] = m

A tensor is called base_model.model.<module>.lora_A.weight, where <module>.weight is the name of the weight in the
model's own directory (names as of peft 0.21). What PEFT would compute differently from `models.lora` is refused by
name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from rljax.models import decoder, hf, layout, lora, stacks
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig
from rljax.types import Params

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
STORED_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
MERGE_INSTEAD = "merge the adapter into the model instead"
FUSED_REFUSED = f"Phi-3 stores these projections as one, whose adapter is another; {MERGE_INSTEAD}"

LEGAL_VALUES = {  # the fields whose value must be one of these; PEFT's other ways of starting change the base
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
POSITIVE_FIELDS = ("r", "lora_alpha")
KNOWN_FIELDS = {  # the others say which tensors there are, which the file shows, or are about training and provenance
    *LEGAL_VALUES,
    *POSITIVE_FIELDS,
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
    """Writes a directory that peft loads.

    It is written under another name and renamed at the end, so it is never there half written. Raises ValueError if
    `directory` is not empty, if `adapter` is not that of config.adapter, or if PEFT cannot express it: Phi-3's fused
    projections, dense MLPs of a model with experts.

    Args:
      config: its `adapter` describes the adapter.
      adapter: params["lora"].
      base: the directory of the model that is adapted.
    """
    if config.scan_layers:
        config = dataclasses.replace(config, scan_layers=False)
        adapter = stacks.unstack(adapter)
    lora_config = config.adapter
    leaves = flatten_dict(adapter)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    expected = _adapter_shapes(lora_config, config)
    if shapes != expected:
        differing = {"/".join(map(str, path)) for path, _ in expected.items() ^ shapes.items()}
        raise ValueError(f"the adapter is not that of {lora_config}: {layout.preview(differing)} differ")
    modules = _modules(config, hf.has_fused_projections(base))
    adapted = {path: modules[path] for path in lora.targets(lora_config, decoder.abstract(config))}
    fused = {module for module in adapted.values() if _last_name(module) in layout.FUSED}
    if fused:
        raise ValueError(f"{layout.preview(fused)}: {FUSED_REFUSED} (lora.merge, hf.save)")
    dense = {module for path, module in adapted.items() if path[-2] == "mlp"}
    if config.moe and dense:
        raise ValueError(
            f"{layout.preview(dense)}: peft takes any MLP of a model with experts for the experts; {MERGE_INSTEAD} "
            "(lora.merge, hf.save)"
        )
    peft_config = _peft_config(lora_config, base, _target_modules(adapted, config))
    stored = {_stored_name(modules[path[:-1]], path[-1]): _stored(path, leaf) for path, leaf in leaves.items()}
    with layout.atomic_directory(directory) as unfinished:
        (unfinished / CONFIG_FILE).write_text(json.dumps(peft_config, indent=2) + "\n")
        save_file(stored, unfinished / WEIGHTS_FILE, {"format": "pt"})


def _target_modules(adapted: dict[tuple, str], config: DecoderConfig) -> list[str]:
    """Names of the adapted modules, without their layers where all layers are adapted alike."""
    if _is_uniform(adapted, config):
        return sorted({_last_name(module) for module in adapted.values()})
    return sorted(set(adapted.values()))


def _peft_config(lora_config: LoraConfig, base: str | Path, target_modules: list[str]) -> dict:
    """adapter_config.json."""
    alpha = lora_config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora_config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": lora_config.use_rslora,
        "use_dora": lora_config.use_dora,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def load_adapter(directory: str | Path, config: DecoderConfig) -> tuple[LoraConfig, Params]:
    """(config.adapter, params["lora"]) of an adapter that peft saved; float32.

    The tensors show which weights are adapted. Dropout is ignored. Raises FileNotFoundError without the two files,
    ValueError naming what PEFT would compute differently and the missing, unknown or misshapen tensors.

    Args:
      config: the base's.
    """
    if config.scan_layers:
        lora_config, adapter = load_adapter(directory, dataclasses.replace(config, scan_layers=False))
        return lora_config, stacks.stack(config.layer_scans(), adapter)
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no adapter in {directory}: {name} is missing (pickled weights are not read)")
    peft_config = _read_peft_config(directory / CONFIG_FILE)
    with safe_open(directory / WEIGHTS_FILE, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    modules = _modules(config, fused=False)
    adapted_modules = _adapted_modules(tensors)
    fused = {module for module in adapted_modules if _last_name(module) in layout.FUSED}
    if fused:
        raise ValueError(f"{directory}: {layout.preview(fused)}: {FUSED_REFUSED} (peft: merge_and_unload)")

    adapted = [path for path, module in modules.items() if module in adapted_modules]
    lora_config = LoraConfig(
        rank=peft_config["r"],
        alpha=float(peft_config["lora_alpha"]),
        targets=_target_patterns(adapted, config),
        use_rslora=peft_config["use_rslora"],
        use_dora=peft_config["use_dora"],
    )
    shapes = _adapter_shapes(lora_config, config)
    wanted = {_stored_name(modules[path[:-1]], path[-1]): path for path in shapes}
    missing = wanted.keys() - tensors.keys()
    unknown = tensors.keys() - wanted.keys()
    if missing or unknown or not adapted:
        legal = ", ".join(sorted({_last_name(module) for module in modules.values()}))
        raise ValueError(
            f"{directory}: tensors missing {layout.preview(missing)}; not of this model's adapters "
            f"{layout.preview(unknown)}; legal: {', '.join(STORED_NAMES.values())} (with use_dora) of {legal}"
        )
    params = {}
    for name, path in wanted.items():
        tensor = tensors[name]
        stored_shape = _stored_shape(path, shapes[path])
        if tensor.shape != stored_shape:
            raise ValueError(f"{directory}: {name} has shape {tensor.shape}; r and the model make it {stored_shape}")
        params[path] = jnp.asarray(tensor.T.reshape(shapes[path]), jnp.float32)
    return lora_config, unflatten_dict(params)


def _adapted_modules(names: Iterable[str]) -> set[str]:
    """The modules that these tensors adapt."""
    matches = (re.fullmatch(r"base_model\.model\.(.*)\.lora_\w+(\.weight)?", name) for name in names)
    return {match[1] for match in matches if match}


def _target_patterns(adapted: list[tuple], config: DecoderConfig) -> tuple[str, ...]:
    """Patterns for LoraConfig.targets, without their layers where all layers are adapted alike."""
    start = 2 if _is_uniform(adapted, config) else 0
    return tuple(dict.fromkeys("/".join(map(str, path[start:])) for path in adapted))


def _read_peft_config(file: Path) -> dict:
    """adapter_config.json. Raises one ValueError for all that is not legal. An unknown field must be off."""
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    raw = {"bias": "none", "init_lora_weights": True, "use_rslora": False, "use_dora": False} | raw
    legal = {}
    for name, values in LEGAL_VALUES.items():
        if raw.get(name) not in values:
            legal[name] = " or ".join(map(repr, values))
    for name in POSITIVE_FIELDS:
        value = raw.get(name)
        if not (isinstance(value, int | float) and value > 0):
            legal[name] = "a positive number"
    for name in sorted(raw.keys() - KNOWN_FIELDS):
        if raw[name]:
            legal[name] = "off (null, false, empty)"
    if legal:
        wrong = [f"{name} is {raw.get(name)!r}, legal: {what}" for name, what in legal.items()]
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    return raw


def _modules(config: DecoderConfig, fused: bool) -> dict[tuple, str]:
    """Path of each weight that may be adapted -> the module that holds it."""
    slices = layout.tensor_slices(config, fused)
    paths = lora.adaptable(decoder.abstract(config)).values()
    return {path: slices[path][0].name.removesuffix(".weight") for path in paths}


def _last_name(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _is_uniform(adapted: Collection[tuple], config: DecoderConfig) -> bool:
    """Whether all layers are adapted alike, so that a weight's name needs no layer."""
    return len(adapted) == config.num_layers * len({path[2:] for path in adapted})


def _adapter_shapes(lora_config: LoraConfig, config: DecoderConfig) -> dict[tuple, tuple]:
    """Path -> shape of each of the adapter's arrays."""
    shapes = jax.eval_shape(partial(lora.init, lora_config), decoder.abstract(config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def _stored_name(module: str, part: str) -> str:
    return f"base_model.model.{module}.{STORED_NAMES[part]}"


def _stored_shape(path: tuple, shape: tuple) -> tuple[int, ...]:
    """Shape of the stored tensor: [r in], [out r] or [out]."""
    if path[-1] == "magnitude":
        return (math.prod(shape),)
    if path[-1] == "down":
        return shape[-1], math.prod(shape[:-1])
    return math.prod(shape[1:]), shape[0]


def _stored(path: tuple, leaf) -> np.ndarray:
    """Contiguous: safetensors 0.8.0 writes other arrays wrongly."""
    transposed = _stored_shape(path, leaf.shape)[::-1]
    return np.ascontiguousarray(np.asarray(leaf).reshape(transposed).T)
