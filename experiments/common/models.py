"""Models of a Hugging Face directory, as `Weights` says how to hold and train them."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.settings import Adapter, Weights
from rljax.models import decoder, heads, hf, lora, param_filters, policy
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig
from rljax.models.stored import holds_tensors, stored_files
from rljax.train import distributed
from rljax.train.mesh import hidden_sharding, param_shardings
from rljax.train.watchdog import sign_of_life
from rljax.types import Array, Params, TrainState


def check_not_trained(weights: Weights) -> None:
    """Raise ValueError for settings of training, which a script that trains nothing would ignore."""
    held = ("dtype", "scan_layers", "batch_invariant", "gather_for_generation")
    fields = [field.name for field in dataclasses.fields(weights) if field.name not in held]
    wrong = [name for name in fields if getattr(weights, name) != getattr(Weights(), name)]
    if wrong:
        legal = ", ".join(f"--weights.{name}" for name in held)
        raise ValueError(f"weights.{wrong[0]} says how to train, and nothing is trained here; legal: {legal}")


def load_pretrained(
    directory: str,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    context: int | None = None,
    seed: int = 0,
    reference: bool = True,
    reward_model: bool = False,
) -> tuple[DecoderConfig, Params, dict]:
    """The model's config, its trained parameters, and the frozen ones: the reference, and what is not trained.

    Trained parameters are float32. A base under an adapter is held in the dtype of the computation.

    Args:
      context: tokens of the longest row.
      seed: of the adapter's initial values.
      reference: keep a copy of the model as it is now; an adapter's base is there anyway.
      reward_model: with a score head, that of the directory or a new one, drawn from the seed.
    Raises ValueError for an adapter together with `freeze`, and for a reward model of rows that longrope has another
    table for: it is read with that of short texts, whatever row it scores.
    """
    if weights.adapter.rank and weights.freeze:
        raise ValueError(
            "with an adapter the whole base is frozen: leave out --weights.freeze or --weights.adapter.rank"
        )
    limit = hf.longrope_limit(directory) if reward_model else None
    if limit is not None and (context or 0) > limit:
        raise ValueError(
            f"a row of {context} tokens: {directory} has other positions (longrope) beyond {limit}, with which no "
            f"reward model is read; legal: --data.max_tokens {limit}"
        )
    config = trained_config(hf.read_config(directory, context, reward_model), weights, mesh)
    params = load_decoder(directory, config, mesh, stored_dtype(weights))
    if reward_model:
        params = _with_score_head(params, config, directory, seed)
    return config, *trained_and_frozen(params, config, weights, seed, reference)


def trained_config(config: DecoderConfig, weights: Weights, mesh: jax.sharding.Mesh) -> DecoderConfig:
    """The config of a model that is trained as `weights` says."""
    return dataclasses.replace(
        config,
        dtype=weights.dtype,
        remat=weights.remat,
        scan_layers=weights.scan_layers,
        adapter=lora_of(weights.adapter),
        batch_invariant=weights.batch_invariant,
        hidden_sharding=hidden_sharding(mesh),
        gather_for_generation=weights.gather_for_generation,
    )


def stored_dtype(weights: Weights) -> str:
    """Dtype of a model's parameters: the trained ones are float32, an adapter's base is as it is computed with."""
    return weights.dtype if weights.adapter.rank else "float32"


def trained_and_frozen(
    params: Params, config: DecoderConfig, weights: Weights, seed: int = 0, reference: bool = True
) -> tuple[Params, dict]:
    """A model's parameters as those that are trained and the frozen ones; see `load_pretrained`."""
    if config.adapter is not None:
        return _with_adapter(params, config, weights, seed)
    frozen = {}
    if weights.freeze:
        params, frozen["base"] = param_filters.split_frozen(params, *weights.freeze)
    if reference:
        frozen["reference"] = jax.tree.map(jnp.copy, params)
    return params, frozen


def _with_score_head(params: Params, config: DecoderConfig, directory: str, seed: int) -> Params:
    """The parameters with the score head of a reward model's directory, or with a new one."""
    if hf.SCORE in stored_files(Path(directory)):
        return {**params, "score_head": hf.load_score_head(directory)}
    return heads.with_score_head(params, config, jax.random.fold_in(jax.random.key(seed), 4))


def load_decoder(directory: str, config: DecoderConfig, mesh: jax.sharding.Mesh, dtype: str) -> Params:
    """{"decoder": ...} of a model directory, read straight into its shardings."""
    shardings = param_shardings(mesh, decoder.param_axes(config), decoder.abstract(config))
    return {"decoder": hf.load(directory, config, shardings, jnp.dtype(dtype))}


def init_sharded(config: DecoderConfig, key: Array, mesh: jax.sharding.Mesh) -> Params:
    """Random parameters, each drawn where it will lie."""
    init = partial(policy.init, config)
    shapes = jax.eval_shape(init, key)
    shardings = param_shardings(mesh, policy.logical_axes(config, shapes), shapes)
    return jax.jit(init, out_shardings=shardings)(key)


def load_model(
    directory: str, mesh: jax.sharding.Mesh, dtype: str, context: int | None = None, scan_layers: bool = False
) -> tuple[DecoderConfig, Params]:
    """Config and parameters of a model that is not trained, in the dtype of the computation."""
    config = hf.read_config(directory, context)
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers, hidden_sharding=hidden_sharding(mesh))
    return config, load_decoder(directory, config, mesh, dtype)


def load_teacher(
    directory: str, student: DecoderConfig, dtype: str, mesh: jax.sharding.Mesh, context: int
) -> tuple[DecoderConfig, Params]:
    """A teacher for distillation: its config and its parameters.

    Raises ValueError where it has another number of token ids than the student.
    """
    vocab_size = hf.read_config(directory, context).vocab_size
    if vocab_size != student.vocab_size:
        raise ValueError(
            f"{directory}: a teacher of {vocab_size} token ids, the student has {student.vocab_size}; "
            "legal: the same vocabulary"
        )
    config, params = load_model(directory, mesh, dtype, context, student.scan_layers)
    return dataclasses.replace(config, gather_for_generation=student.gather_for_generation), params


def add_critic(
    params: Params, frozen: Params, config: DecoderConfig, kind: str, directory: str, mesh: jax.sharding.Mesh
) -> Params:
    """The parameters with a critic.

    Args:
      kind: "shared": a head on the policy's decoder; "separate": a decoder of its own.
      directory: of the reward model that a separate critic begins as, its score being the first value; "": as a copy of
        the policy, whose values are 0.
    Raises ValueError for a reward model that is no decoder of the policy's sizes.
    """
    if kind == "shared":
        if directory:
            raise ValueError("a critic that begins as a reward model has a trunk of its own; legal: --critic separate")
        return policy.with_value_head(params, config)
    start = frozen["base"] if config.adapter is not None else decoder.full_params(config, params, frozen)
    critic = policy.with_critic({"decoder": start["decoder"]}, config)["critic"]
    critic = jax.tree.map(lambda x: x.astype(jnp.float32), critic)
    if not directory:
        return {**params, "critic": critic}

    reward_config = hf.read_config(directory, reward_model=True)
    reward_config = dataclasses.replace(reward_config, scan_layers=config.scan_layers)
    loaded = load_decoder(directory, reward_config, mesh, "float32")
    # A reward model may lack the table of logits, which a critic does not use.
    trunk = {**critic["decoder"], **loaded["decoder"]}
    if jax.tree.map(jnp.shape, trunk) != jax.tree.map(jnp.shape, critic["decoder"]):
        raise ValueError(f"{directory} has other sizes than the policy; legal: a reward model of the same architecture")
    return {**params, "critic": {"decoder": trunk, "value_head": hf.load_score_head(directory)}}


def lora_of(adapter: Adapter) -> LoraConfig | None:
    """The adapter of these settings; None where its rank is 0."""
    if not adapter.rank:
        return None
    return LoraConfig(
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )


def _with_adapter(params: Params, config: DecoderConfig, weights: Weights, seed: int) -> tuple[Params, dict]:
    """Adapter and frozen base. A reference that follows the policy is an adapter of its own."""
    key = jax.random.fold_in(jax.random.key(seed), 3)

    def trained_of(params: Params) -> Params:
        return policy.with_adapter(params, config, key)[0]

    shardings = None
    if config.hidden_sharding is not None:  # each array is drawn where it will lie
        shapes = jax.eval_shape(trained_of, params)
        shardings = param_shardings(config.hidden_sharding.mesh, policy.logical_axes(config, shapes), shapes)
    trained = jax.jit(trained_of, out_shardings=shardings)(params)
    frozen = {"base": {"decoder": params["decoder"]}, "reference": {}}
    if weights.ref_sync_steps:
        frozen["reference"] = jax.tree.map(jnp.copy, trained)
    return trained, frozen


def save_pretrained(
    params: Params,
    frozen: Params,
    config: DecoderConfig,
    source: str | Path,
    directory: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    replace: bool = True,
    reward_kind: hf.RewardKind = "outcome",
) -> None:
    """Write what was trained as a model directory that transformers and every script load: weights, config, tokenizer.

    With a score head it is a reward model. An adapter is merged in float32 into the model that it was trained on, if
    `source` holds its weights, else into the copy in `frozen`, which has the precision of the computation.

    Args:
      source: the model directory from which config and tokenizer are copied.
      dtype: of the weights; None: that of the source.
      replace: a directory that is there is replaced by a whole one; else ValueError.
      reward_kind: of a reward model; config.json keeps it.
    """
    head = params.get("score_head")
    if "lora" in params:
        base = {} if holds_tensors(Path(source)) else frozen["base"]
        low_rank, base, head = jax.tree.map(distributed.fetch_to_main, (params["lora"], base, head))
        whole = _merged(low_rank, base, config, source) if distributed.is_main() else decoder.abstract(config)
    else:
        whole = decoder.overwrite(frozen.get("base", {}), params)["decoder"]
    if distributed.is_main():
        hf.save(directory, config, whole, source, dtype, shard_bytes, head, replace, reward_kind, _fetch)
    else:
        for _ in hf.tensors_to_write(config, whole, source, head, _fetch):
            pass  # process 0 writes what all fetch
    distributed.exchange("save a model", None)


def _fetch(param: Any, layer: int | None) -> np.ndarray | None:
    """`distributed.fetch_to_main`, each time with a sign of life: writing a large model takes long.

    The others wait for process 0, which writes a file, in a message: it has a longer deadline than a collective.
    """
    sign_of_life()
    distributed.exchange("a parameter to save", None)
    return distributed.fetch_to_main(param, layer)


def keep_model_files(
    source: str | Path, directory: str | Path, adapter: LoraConfig | None, reward_kind: hf.RewardKind | None = None
) -> None:
    """Write beside the checkpoints what tools/export.py needs of the model that a run began with."""
    distributed.on_main("model files", lambda: hf.copy_sidecar_files(source, directory, adapter, reward_kind))


def _merged(low_rank: Params, base: Params, config: DecoderConfig, source: str | Path) -> Params:
    """The decoder's parameters with the adapter merged into them, in float32, on the host."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    if holds_tensors(Path(source)):
        shardings = jax.tree.map(lambda _: host, decoder.abstract(config))
        whole = hf.load(source, config, shardings)
    else:
        whole = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), base["decoder"]), host)
    return lora.merge(config.adapter, whole, jax.device_put(jax.device_get(low_rank), host))


def sync_reference(state: TrainState, weights: Weights) -> TrainState:
    """After every `ref_sync_steps` steps: mix the policy into the reference."""
    if weights.ref_sync_steps and int(state.step) % weights.ref_sync_steps == 0:
        return policy.sync_reference(state, weights.ref_mixup_alpha)
    return state
