"""Hugging Face model directories, read and written without torch: config.json, *.safetensors.

Tensors are read one by one, or only the part of one that a device holds, straight into their place: there are never two
copies of a model. A tensor that is missing, or that the family does not have, is an error. Pickled weights are not
read, and no code of a model directory is run.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import safe_open
from safetensors.numpy import save_file

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.families import has_own_head, read_raw
from rljax.models.families import longrope_limit as longrope_limit
from rljax.models.families import read_config as read_config
from rljax.models.layout import (
    NOT_TRANSPOSED,
    TensorSlice,
    atomic_directory,
    num_input_axes,
    num_stacked_axes,
    path_keys,
    preview,
    tensor_shapes,
    tensor_slices,
)
from rljax.models.lora import LoraConfig
from rljax.models.stacks import layers_of
from rljax.models.stored import HEAD, INDEX, read_object, stored_files
from rljax.types import Params

SCORE = "score.weight"  # the head of a reward model
REWARD_KIND = "reward_model"  # key of config.json, which transformers ignores
RewardKind = Literal["outcome", "process"]  # whether the head judges a completion by its last token, or every step


def reward_kind(directory: str | Path) -> RewardKind | None:
    """What the reward model in the directory judges; None where its config.json, which others wrote, does not say."""
    return read_raw(directory).get(REWARD_KIND)


def has_fused_projections(directory: str | Path) -> bool:
    """Whether the directory stores projections of the same input as one tensor (Phi-3)."""
    return read_raw(directory).get("model_type") == "phi3"


# ------------------------------------------------------------------------------------------------------------- reading


def load(directory: str | Path, config: DecoderConfig, shardings: Params | None = None, dtype=jnp.float32) -> Params:
    """Parameters of the decoder from the directory's safetensors, straight into `shardings` (one per parameter).

    Each device reads its own part. Raises FileNotFoundError without a safetensors file, ValueError naming the missing,
    unknown or misshapen tensors.
    """
    files = stored_files(Path(directory))
    slices = tensor_slices(config, has_fused_projections(directory))
    _check_tensors(directory, config, files, tensor_shapes(piece for found in slices.values() for piece in found))
    shapes = decoder.abstract(config)
    if shardings is None:
        first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first_device, shapes)
    leaves = {path_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    sharding_of = {path_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)}
    params = {}
    # The largest first: the temporary copy beside the array being made is then small.
    for path in sorted(leaves, key=lambda path: -math.prod(leaves[path].shape)):
        params[path] = _load_param(files, path, slices[path], leaves[path].shape, sharding_of[path], dtype)
    return jax.tree.map_with_path(lambda path, _: params[path_keys(path)], shapes)


def _check_tensors(directory, config: DecoderConfig, files: dict[str, Path], wanted: dict[str, tuple]) -> None:
    """Raises ValueError unless the stored tensors are those of the config, in names and shapes."""
    stored = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    unknown = stored - wanted.keys() - {SCORE}
    if config.tie_word_embeddings:  # the embedding a second time, or `read_config` had said otherwise
        unknown -= {HEAD}
    missing = wanted.keys() - files.keys()
    if missing or unknown:
        raise ValueError(f"{directory}: tensors missing {preview(missing)}; not of this family {preview(unknown)}")
    for file in sorted(set(files.values())):
        with safe_open(file, framework="numpy") as opened:
            for name in sorted(wanted.keys() & opened.keys()):
                shape = tuple(opened.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise ValueError(f"{directory}: {name} has shape {shape}; config.json makes it {wanted[name]}")


def _load_param(files: dict[str, Path], path: tuple, slices: list[TensorSlice], shape, sharding, dtype) -> jax.Array:
    """One parameter from its slices; each device reads its own index."""

    def read_index(index) -> np.ndarray:
        index = tuple(slice(*i.indices(n)) for i, n in zip(index, shape, strict=True))
        stacked = num_stacked_axes(path, shape)
        if not stacked:
            return _read_slice(files, path, slices[0], index, shape, dtype)
        numbers = np.arange(len(slices)).reshape(shape[:stacked])[index[:stacked]]
        out = np.empty([i.stop - i.start for i in index], dtype)
        for place, number in np.ndenumerate(numbers):
            out[place] = _read_slice(files, path, slices[number], index[stacked:], shape[stacked:], dtype)
        return out

    return jax.make_array_from_callback(shape, sharding, read_index)


def _read_slice(
    files: dict[str, Path], path: tuple, piece: TensorSlice, index: tuple[slice, ...], shape, dtype
) -> np.ndarray:
    """The indexed part of a parameter of this shape that is stored as one slice."""
    name = path[-1]
    if name == "embedding":  # stored [V D], not transposed: rows are its first axis
        rows = _flat_index(index[:1], shape[:1])
        columns = _flat_index(index[1:], shape[1:])
    else:
        inputs = 0 if name in NOT_TRANSPOSED else num_input_axes(path)
        rows = _flat_index(index[inputs:], shape[inputs:])
        columns = _flat_index(index[:inputs], shape[:inputs])
    rows = slice(piece.start + rows.start, piece.start + rows.stop)
    with safe_open(files[piece.name], framework="numpy") as opened:
        stored = opened.get_slice(piece.name)
        tensor = stored[rows] if piece.columns is None else stored[rows, columns]
    if name not in NOT_TRANSPOSED:
        tensor = tensor.T
    sizes = tuple(i.stop - i.start for i in index)
    return np.ascontiguousarray(tensor).reshape(sizes).astype(dtype, copy=False)


def _flat_index(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """An index over several axes as one over their product. Only the first axis may be cut."""
    if not index:
        return slice(0, 1)
    first, *others = index
    if any(i != slice(0, n, 1) for i, n in zip(others, shape[1:], strict=True)):
        raise ValueError(f"a stored axis has become the axes {shape}; only the first of them may be sharded")
    step = math.prod(shape[1:])
    return slice(first.start * step, first.stop * step)


def load_score_head(directory: str | Path, dtype=jnp.float32) -> jax.Array:
    """The head [D] of a reward model's directory. Raises ValueError without one, or for more than one label."""
    files = stored_files(Path(directory))
    if SCORE not in files:
        raise ValueError(f"{directory} holds no {SCORE}: it is no reward model")
    with safe_open(files[SCORE], framework="numpy") as opened:
        head = opened.get_tensor(SCORE)
    if head.shape[0] != 1:
        raise ValueError(f"{directory}: {SCORE} has {head.shape[0]} labels; legal: 1")
    return jnp.asarray(head[0].astype(dtype))


# ------------------------------------------------------------------------------------------------- config and tokenizer

SIDECAR_FILES = (  # what a model directory has beside its weights
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# The fields of a LoraConfig that have another name in adapter.json.
ADAPTER_NAMES = {"use_rslora": "rank_stabilised", "use_dora": "decomposed"}


def copy_config_and_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Copies what a model directory has beside its weights: config, tokenizer, chat template, generation config.

    A config.json that says tied beside an output head with values of its own says untied in the copy.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name in SIDECAR_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(directory) / name)
    if has_own_head(source):
        raw = read_raw(source) | {"tie_word_embeddings": False}
        (Path(directory) / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def copy_sidecar_files(
    source: str | Path,
    directory: str | Path,
    adapter: LoraConfig | None = None,
    reward_kind: RewardKind | None = None,
) -> None:
    """Writes beside a run's checkpoints all that an export of them needs: config, tokenizer, and adapter.json.

    reward_kind: of a reward model, which config.json then says.
    """
    copy_config_and_tokenizer(source, directory)
    if reward_kind is not None:
        raw = read_raw(directory) | {REWARD_KIND: reward_kind}
        (Path(directory) / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if adapter is not None:
        fields = {ADAPTER_NAMES.get(name, name): value for name, value in dataclasses.asdict(adapter).items()}
        record = {"base": str(Path(source).resolve()), "lora": fields}
        (Path(directory) / "adapter.json").write_text(json.dumps(record))


def read_adapter(directory: str | Path) -> tuple[LoraConfig | None, Path]:
    """The adapter in adapter.json, or None, and the base's directory.

    The base is the recorded directory if that still exists, else `directory`.
    """
    file = Path(directory) / "adapter.json"
    if not file.is_file():
        return None, Path(directory)
    record = json.loads(file.read_text())
    base = Path(record["base"])
    stored = record["lora"]
    fields = {field.name: stored[ADAPTER_NAMES.get(field.name, field.name)] for field in dataclasses.fields(LoraConfig)}
    fields["targets"] = tuple(fields["targets"])
    return LoraConfig(**fields), base if (base / "config.json").is_file() else Path(directory)


def to_hf_config(config: DecoderConfig, stop: tuple[int, ...], dtype: str = "float32") -> dict:
    """config.json of a Llama decoder that was trained from scratch. Raises ValueError for one that is no Llama.

    Args:
      stop: token ids that end a completion.
    """
    shape = [getattr(config, field.name) for field in dataclasses.fields(config)[:8]]
    free = ("rms_norm_eps", "tie_word_embeddings", "dtype", "attn_implementation", "adapter")
    free += ("remat", "scan_layers", "hidden_sharding", "gather_for_generation")  # of how it is computed
    llama = dataclasses.replace(DecoderConfig(*shape), **{name: getattr(config, name) for name in free})
    if llama != config:
        raise ValueError("only a Llama can be written; a decoder that was loaded keeps its own config.json")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": list(stop),
        "dtype": dtype,
    }


# ------------------------------------------------------------------------------------------------------------- writing

FetchParam = Callable[[Any, int | None], np.ndarray | None]  # (parameter, layer of a stacked one) -> that, on the host


def as_numpy(param: Any, layer: int | None) -> np.ndarray:
    return np.asarray(param if layer is None else param[layer])


def save(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    source: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    score_head: Float[Array, "D"] | None = None,
    replace: bool = False,
    reward_kind: RewardKind = "outcome",
    fetch: FetchParam = as_numpy,
) -> None:
    """Writes a model directory that transformers loads.

    It is written under another name and renamed at the end, so it is never there half written. Tensors are written in
    files of at most `shard_bytes`, one file in memory at a time. Raises ValueError if `directory` is not empty, unless
    it is to be replaced.

    Args:
      params: the decoder's.
      source: the model directory from which config and tokenizer are copied.
      dtype: of the weights; None: that of the config.json.
      score_head: makes it a reward model (transformers' sequence classification with one label), without a table of
      logits. Its files name a padding token that ends no completion (`reward_model_pad`).
      reward_kind: of a reward model, for `reward_kind()`.
      fetch: brings parameters to the host, a whole one or one of its layers at a time.
    """
    raw = read_raw(source)
    raw.pop("auto_map", None)  # names code of the model directory, which is not copied
    raw.pop(REWARD_KIND, None)
    dtype = dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    if has_own_head(source):
        raw["tie_word_embeddings"] = False
    if score_head is not None:
        raw["architectures"] = [_classifier_of(name) for name in raw.get("architectures") or []]
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": reward_model_pad(source)}
        raw[REWARD_KIND] = reward_kind
    with atomic_directory(directory, replace) as unfinished:
        copy_config_and_tokenizer(source, unfinished)
        if score_head is not None:
            _name_pad(unfinished, raw["pad_token_id"])
        (unfinished / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        named = tensors_to_write(config, params, source, score_head, fetch)
        _write_shards(unfinished, named, jnp.dtype(dtype), shard_bytes)


def named_tensors(
    config: DecoderConfig, params: Params, fused: bool = False, fetch: FetchParam = as_numpy
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Every stored tensor of the decoder's parameters, one at a time, with its name: the inverse of `load`.

    None where `fetch` gives none: on a process that only takes part.
    """
    leaves = {path_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    rows_of: dict[
        str, list[tuple[int, tuple, tuple]]
    ] = {}  # stored name -> (first row, path, place in it) of each part
    for path, slices in tensor_slices(config, fused).items():
        shape = leaves[path].shape
        places = np.ndindex(shape[: num_stacked_axes(path, shape)])
        for place, piece in zip(places, slices, strict=True):
            rows_of.setdefault(piece.name, []).append((piece.start, path, place))
    fetch_block = lru_cache(maxsize=1)(lambda path, layer: fetch(leaves[path], layer))  # all experts of a layer at once
    for name, parts in rows_of.items():
        rows = []
        for _, path, place in sorted(parts):
            layered = layers_of(path) is not None
            block = fetch_block(path, place[0] if layered else None)
            if block is not None:
                rows.append(_stored_tensor(path, block[place[layered:]]))
        yield name, np.concatenate(rows) if len(rows) > 1 else next(iter(rows), None)


def _stored_tensor(path: tuple, array: np.ndarray) -> np.ndarray:
    """A parameter as it is stored; always contiguous: safetensors 0.8.0 writes other arrays wrongly."""
    if path[-1] == "embedding":
        return np.ascontiguousarray(array)
    if path[-1] in NOT_TRANSPOSED:
        return array.reshape(-1)
    return np.ascontiguousarray(array.reshape(math.prod(array.shape[: num_input_axes(path)]), -1).T)


def tensors_to_write(
    config: DecoderConfig,
    params: Params,
    source: str | Path,
    score_head: Array | None = None,
    fetch: FetchParam = as_numpy,
) -> Iterator[tuple[str, np.ndarray | None]]:
    """What `save` writes: the decoder's tensors; those of a reward model where there is a head."""
    for name, tensor in named_tensors(config, params, has_fused_projections(source), fetch):
        if score_head is None or name != HEAD:
            yield name, tensor
    if score_head is not None:
        head = fetch(score_head, None)
        yield SCORE, None if head is None else head[None]


def _classifier_of(architecture: str) -> str:
    """transformers' name of the sequence classifier with this decoder."""
    text_only = architecture.replace("Gemma3ForCausalLM", "Gemma3TextForCausalLM")  # the other one takes images
    return text_only.replace("ForCausalLM", "ForSequenceClassification")


def reward_model_pad(source: str | Path) -> int:
    """The id that pads the texts of a reward model: it must end no completion.

    transformers scores a text at its last token that is not padding, so padding with EOS would score the token before
    it. The first that ends no text of: the pad_token_id of config.json, the tokenizer's pad token, a special token with
    "pad" in its name, the unknown token, the one that begins a text, any other special token. Raises ValueError where
    there is none.
    """
    about = read_raw(source)
    named = _read_json(source, "special_tokens_map.json") | _read_json(source, "tokenizer_config.json")
    added = _read_json(source, "tokenizer.json").get("added_tokens", [])
    special = {token["content"]: token["id"] for token in added if token.get("special")}

    def id_of(name: str) -> int | None:
        token = named.get(name)
        return special.get(token["content"] if isinstance(token, dict) else token)

    ends = {id_of("eos_token")}
    for found in (about, _read_json(source, "generation_config.json")):
        ids = found.get("eos_token_id")
        ends |= set(ids) if isinstance(ids, list) else {ids}
    padding = [number for text, number in special.items() if "pad" in text]
    candidates = [about.get("pad_token_id"), id_of("pad_token"), *padding, id_of("unk_token"), id_of("bos_token")]
    for candidate in [*candidates, *special.values()]:
        if candidate is not None and candidate not in ends:
            return candidate
    raise ValueError(
        f"{Path(source) / 'config.json'}: pad_token_id is {about.get('pad_token_id')}, eos_token_id "
        f"{about.get('eos_token_id')}; transformers would score another token than the completion's last; legal: the "
        "id of a token that no completion has"
    )


def _name_pad(directory: Path, pad: int) -> None:
    """Writes the padding token into the tokenizer's settings too, if it is one of the tokenizer's special tokens."""
    added = _read_json(directory, "tokenizer.json").get("added_tokens", [])
    texts = [token["content"] for token in added if token["id"] == pad]
    if texts:
        settings = _read_json(directory, "tokenizer_config.json") | {"pad_token": texts[0]}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _read_json(directory: str | Path, name: str) -> dict:
    """What a file of the directory holds; nothing where there is none."""
    file = Path(directory) / name
    return read_object(file) if file.is_file() else {}


def _write_shards(directory: Path, named: Iterator[tuple[str, np.ndarray]], dtype, shard_bytes: int) -> None:
    """Files are numbered as they fill; their number is known, and put into their names, at the end."""
    shards = []
    shard = {}
    size = 0

    def close_shard():
        save_file(shard, directory / f"part-{len(shards)}", {"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})

    for name, tensor in named:
        tensor = tensor.astype(dtype, copy=False)
        if shard and size + tensor.nbytes > shard_bytes:
            close_shard()
            shard = {}
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    close_shard()
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    for i, file in enumerate(files):
        (directory / f"part-{i}").rename(directory / file)
    if count > 1:
        _write_index(directory, files, shards)


def _write_index(directory: Path, files: list[str], shards: list[dict[str, int]]) -> None:
    """The index of several files, given the tensors of each and their bytes."""
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total_size = sum(size for shard in shards for size in shard.values())
    index = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
    (directory / INDEX).write_text(index + "\n")
