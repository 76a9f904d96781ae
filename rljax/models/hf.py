"""Hugging Face model directories, in and out, without torch: config.json, *.safetensors.

Tensors are read one by one, or only the part of one that a device holds, straight into their place; never two copies of
a model. What a directory holds and the family does not know, or the other way round, is an error, never a guess. Only
safetensors: pickled weights are not read, and no code of a model directory is run.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.families import read_config as read_config
from rljax.models.families import read_raw
from rljax.models.layout import KEPT, Piece, inputs_of, is_stacked, keys, pieces, shapes_of, some, written_whole
from rljax.models.lora import Lora
from rljax.types import Params


def is_fused(directory: str | Path) -> bool:
    return read_raw(directory).get("model_type") == "phi3"


# ------------------------------------------------------------------------------------------------------------- reading


def load(directory: str | Path, config: DecoderConfig, shardings: Params | None = None, dtype=jnp.float32) -> Params:
    """Parameters of the decoder from the directory's safetensors, straight into `shardings` (one per parameter).

    Each device reads its own part. Raises FileNotFoundError without a safetensors file, ValueError naming every
    missing, unknown or misshapen tensor.
    """
    files, wanted = stored_files(Path(directory)), pieces(config, is_fused(directory))
    stored = shapes_of(piece for found in wanted.values() for piece in found)
    _require_the_same(directory, config, files, stored)
    shapes = decoder.abstract(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, shapes) if shardings is None else shardings
    leaves = {keys(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    places = {keys(path): place for path, place in jax.tree.leaves_with_path(shardings)}
    read = {}
    # The largest first: what is alive for a moment beside the array being made is then small.
    for path in sorted(leaves, key=lambda path: -math.prod(leaves[path].shape)):
        read[path] = _place(files, path, wanted[path], leaves[path].shape, places[path], dtype)
    return jax.tree.map_with_path(lambda path, _: read[keys(path)], shapes)


def _require_the_same(directory, config: DecoderConfig, files: dict[str, Path], wanted: dict[str, tuple]) -> None:
    """The tensors there are those of the config, in names and shapes; each file is opened once."""
    unknown = {n for n in files if not n.endswith("rotary_emb.inv_freq")} - wanted.keys() - {SCORE}
    if config.tied:
        unknown -= {"lm_head.weight"}
    missing = wanted.keys() - files.keys()
    if missing or unknown:
        raise ValueError(f"{directory}: tensors missing {some(missing)}; not of this family {some(unknown)}")
    for file in sorted(set(files.values())):
        with safe_open(file, framework="numpy") as opened:
            for name in sorted(wanted.keys() & opened.keys()):
                shape = tuple(opened.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise ValueError(f"{directory}: {name} has shape {shape}; config.json makes it {wanted[name]}")


def _place(files: dict[str, Path], path: tuple, found: list[Piece], shape, sharding, dtype) -> jax.Array:
    """The parameter, made of what its pieces hold; each device asks for its own index."""

    def part(index) -> np.ndarray:
        index = tuple(slice(*i.indices(n)) for i, n in zip(index, shape, strict=True))
        if not is_stacked(path, shape):
            return _read(files, path, found[0], index, shape, dtype)
        each = [_read(files, path, piece, index[1:], shape[1:], dtype) for piece in found[index[0]]]
        return np.stack(each)

    return jax.make_array_from_callback(shape, sharding, part)


def _read(files: dict[str, Path], path: tuple, piece: Piece, index: tuple[slice, ...], shape, dtype) -> np.ndarray:
    """The indexed part of a parameter of this shape that is stored in one piece."""
    inputs = 0 if path[-1] in KEPT else inputs_of(path)
    inside, outside = (index[:inputs], shape[:inputs]), (index[inputs:], shape[inputs:])
    if path[-1] == "embedding":
        inside, outside = (index[1:], shape[1:]), (index[:1], shape[:1])
    rows, columns = _flat(*outside), _flat(*inside)
    rows = slice(piece.start + rows.start, piece.start + rows.stop)
    with safe_open(files[piece.name], framework="numpy") as opened:
        stored = opened.get_slice(piece.name)
        tensor = stored[rows] if piece.columns is None else stored[rows, columns]
    tensor = tensor if path[-1] in KEPT else tensor.T
    sizes = tuple(i.stop - i.start for i in index)
    return np.ascontiguousarray(tensor).reshape(sizes).astype(dtype, copy=False)


def _flat(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """An index over several axes as one over their product: the first may be cut, the others are whole."""
    if not index:
        return slice(0, 1)
    first, *others = index
    if any(i != slice(0, n, 1) for i, n in zip(others, shape[1:], strict=True)):
        raise ValueError(f"only the first of the axes {shape} that a stored axis became may be sharded")
    step = math.prod(shape[1:])
    return slice(first.start * step, first.stop * step)


def load_score_head(directory: str | Path, dtype=jnp.float32) -> jax.Array:
    """The head [D] of a reward model's directory. Raises ValueError where there is none of one label."""
    files = stored_files(Path(directory))
    if SCORE not in files:
        raise ValueError(f"{directory} holds no {SCORE}: it is no reward model")
    with safe_open(files[SCORE], framework="numpy") as opened:
        head = opened.get_tensor(SCORE)
    if head.shape[0] != 1:
        raise ValueError(f"{directory}: {SCORE} has {head.shape[0]} labels; legal: 1")
    return jnp.asarray(head[0].astype(dtype))


def stored_files(directory: Path) -> dict[str, Path]:
    """Name of each stored tensor -> the file that holds it. An index says which files there are, else all are read."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{directory}: its index names {some(set(absent))}, which are not there")
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


# ------------------------------------------------------------------------------------------------------------- writing

ABOUT = (  # what a model directory holds beside its weights
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


def tensors(config: DecoderConfig, params: Params, fused: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Every stored tensor of the decoder's parameters, one at a time, by name: the inverse of `load`."""
    leaves = {keys(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    parts: dict[str, list[tuple[int, tuple, int]]] = {}
    for path, found in pieces(config, fused).items():
        for number, piece in enumerate(found):
            expert = number if is_stacked(path, leaves[path].shape) else -1
            parts.setdefault(piece.name, []).append((piece.start, path, expert))
    for name, found in parts.items():
        rows = [_stored(path, leaves[path] if e < 0 else leaves[path][e]) for _, path, e in sorted(found)]
        yield name, np.concatenate(rows) if len(rows) > 1 else rows[0]


def _stored(path: tuple, leaf) -> np.ndarray:
    """A parameter as it is stored; always contiguous: safetensors 0.8.0 writes other arrays wrongly."""
    array = np.asarray(leaf)
    if path[-1] == "embedding":
        return np.ascontiguousarray(array)
    if path[-1] in KEPT:
        return array.reshape(-1)
    return np.ascontiguousarray(array.reshape(math.prod(array.shape[: inputs_of(path)]), -1).T)


def copy_about(source: str | Path, directory: str | Path) -> None:
    """What a model directory holds beside its weights: config, tokenizer, chat template, generation config."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name in ABOUT:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(directory) / name)


def keep_about(source: str | Path, directory: str | Path, adapter: Lora | None = None) -> None:
    """Beside a run's checkpoints, all that an export of them needs to know."""
    copy_about(source, directory)
    if adapter is not None:
        noted = {"base": str(Path(source).resolve()), "lora": dataclasses.asdict(adapter)}
        (Path(directory) / "adapter.json").write_text(json.dumps(noted))


def read_adapter(directory: str | Path) -> tuple[Lora | None, Path]:
    """The adapter that `keep_about` noted, if there is one, and the directory of its base, if that is still there."""
    file = Path(directory) / "adapter.json"
    if not file.is_file():
        return None, Path(directory)
    noted = json.loads(file.read_text())
    base, fields = Path(noted["base"]), noted["lora"]
    found = Lora(**fields | {"targets": tuple(fields["targets"])})
    return found, base if (base / "config.json").is_file() else Path(directory)


def describe(config: DecoderConfig, stop: tuple[int, ...], dtype: str = "float32") -> dict:
    """config.json of a Llama-shaped decoder that was made here. Raises ValueError for one that is no Llama."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": config.tied,
        "eos_token_id": list(stop),
        "dtype": dtype,
    }
    plain = DecoderConfig(*(getattr(config, field.name) for field in dataclasses.fields(config)[:8]))
    same = ("norm_epsilon", "tied", "dtype", "attention", "remat", "adapter")
    if dataclasses.replace(plain, **{name: getattr(config, name) for name in same}) != config:
        raise ValueError("only a Llama-shaped decoder can be described; one that was read keeps its own config.json")
    return raw


def save(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    about: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    score_head=None,
) -> None:
    """A model directory that transformers loads: the decoder's parameters, and what stands beside them in `about`.

    Written beside and renamed at the end, so that there is never half a directory. Tensors are written in files of at
    most `shard_bytes`, one file in memory at a time. Raises ValueError where `directory` already holds something.

    Args: dtype: of the weights; None is that of the config.json. score_head [D]: makes it a reward model (transformers'
    sequence classification with one label), which has no table of logits.
    """
    raw = {name: value for name, value in read_raw(about).items() if name != "auto_map"}  # names code that is not taken
    dtype = dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    if score_head is not None:
        _require_pad(about, raw)
        raw["architectures"] = [_scoring(name) for name in raw.get("architectures") or []]
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    with written_whole(directory) as place:
        copy_about(about, place)
        (place / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        _write_shards(place, _written(config, params, is_fused(about), score_head), jnp.dtype(dtype), shard_bytes)


SCORE = "score.weight"


def _scoring(architecture: str) -> str:
    text = architecture.replace("Gemma3ForCausalLM", "Gemma3TextForCausalLM")  # the other one sees pictures
    return text.replace("ForCausalLM", "ForSequenceClassification")


def _require_pad(about: str | Path, raw: dict) -> None:
    """transformers scores at the last token that is no padding: that must not be a token which ends an answer."""
    ends, pad = raw.get("eos_token_id"), raw.get("pad_token_id")
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"{Path(about) / 'config.json'}: pad_token_id is {pad}, eos_token_id {ends}; transformers would score "
            "another token than the answer's last; legal: the id of a token that no answer has"
        )


def _written(config: DecoderConfig, params: Params, fused: bool, score_head) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors(config, params, fused):
        if score_head is None or name != "lm_head.weight":
            yield name, tensor
    if score_head is not None:
        yield SCORE, np.asarray(score_head)[None]


def _write_shards(directory: Path, named: Iterator[tuple[str, np.ndarray]], dtype, shard_bytes: int) -> None:
    """Files are numbered as they fill; how many there are is known, and put into their names, at the end."""
    shards, part, size = [], {}, 0

    def close():
        save_file(part, directory / f"part-{len(shards)}", {"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in part.items()})

    for name, tensor in named:
        tensor = tensor.astype(dtype, copy=False)
        if part and size + tensor.nbytes > shard_bytes:
            close()
            part, size = {}, 0
        part[name], size = tensor, size + tensor.nbytes
    close()
    count = len(shards)
    files = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for i, file in enumerate(files):
        (directory / f"part-{i}").rename(directory / file)
    if count > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        about = {"total_size": sum(size for shard in shards for size in shard.values())}
        index = json.dumps({"metadata": about, "weight_map": where}, indent=2)
        (directory / "model.safetensors.index.json").write_text(index + "\n")
