"""The programs of a step of grpo.py, from shapes alone: nothing is allocated, and the devices need not be there."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import grpo
from experiments.common import controllers, micro_batches, models, train
from experiments.common.chips import Chip
from experiments.common.costs import Sizes
from experiments.common.device_memory import device_bytes
from experiments.common.optimizer import make_optimizer
from experiments.common.sampling import keep_support, sampling_of
from rljax.models import decoder, policy
from rljax.models.decoder import DecoderConfig
from rljax.rollouts import sampler
from rljax.train.mesh import Shardings, sharding_of
from rljax.types import Params, Sampling, TrainState, Trajectory

# Settings of grpo.py with which it compiles other programs than those planned here, and what is planned.
PLANNED = {
    "batches.max_tokens_per_device": 0,  # packed rows: their programs depend on the data
    "batches.carry_over": 0,
    "batches.oversample": 1,
    "sampling.max_concurrent": None,
    "sampling.stop_strings": (),
}


class Program(NamedTuple):
    """One compiled program of a step."""

    name: str
    lower: Callable[[], Any]  # -> jax's `Lowered`
    state_bytes: int  # on a device, of those of its arguments that are parts of the state
    calls: int  # in a step


class StepShapes(NamedTuple):
    """A state of shapes with shardings, how much a step samples and learns from, and its programs."""

    state: TrainState
    sizes: Sizes
    programs: list[Program]


def shapes_of_step(
    cfg: Any, config: DecoderConfig, mesh: jax.sharding.Mesh, stop: tuple[int, ...] = (0,)
) -> StepShapes:
    """What a run of grpo.py with these settings compiles.

    Args:
      cfg: the settings of experiments/preflight.py, those of grpo.py among them.
      stop: ids of the tokenizer that end a completion, which are constants of the program.

    Raises ValueError for settings that grpo.py refuses, and for those that are not planned.
    """
    batches = cfg.batches
    train.check_batches(batches, mesh)
    sampling = planned_sampling(cfg, config, stop)
    algorithm = grpo.named_algorithm(cfg)
    train.check_algorithm(algorithm, batches, cfg.algorithm)
    algorithm = grpo.with_settings(algorithm, cfg, config)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    state, shardings = state_shapes(cfg, config, mesh, optimizer)
    step = grpo.make_step(
        algorithm, optimizer, batches, shardings, config, cfg.max_prompt_tokens, cfg.sampling.max_tokens
    )
    prompts = prompt_shapes(mesh, batches.prompts, cfg.max_prompt_tokens)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    rollout = (state.params, state.frozen, prompts, sampling, seed)
    traj, _ = jax.eval_shape(partial(sampler.sample_on_devices, step.lm), *rollout)
    needs = {"ref_logp", *algorithm.needs}
    annotated = jax.eval_shape(partial(scored, needs), traj)

    base = state.frozen.get("base", {})
    sampled = device_bytes((state.params, base))
    others = {name: part for name, part in state.frozen.items() if name != "base"}
    own = state.params if needs & set(policy.OWN_FIELDS) else {}
    learned = device_bytes((state.params, base, state.opt_state, state.key, state.coefficients))
    minibatch = partial(minibatch_shapes, step, state, batches.minibatches, annotated)
    calls = calls_of_scoring(cfg, config, mesh)
    programs = [
        Program("prefill", lambda: _prefill.lower(step.lm, *rollout[:4]), sampled, 1),
        Program("rollout", lambda: sampler.sample_on_devices.lower(step.lm, *rollout), sampled, 1),
        Program("scoring", lambda: step.annotate.lower(state, traj), device_bytes((base, others, own)), calls),
        Program("update", lambda: step.update.lower(state, minibatch()), learned, batches.epochs * batches.minibatches),
    ]
    return StepShapes(state, sizes_of(cfg, config, mesh), programs)


def planned_sampling(cfg: Any, config: DecoderConfig, stop: tuple[int, ...] = (0,)) -> Sampling:
    """The sampling of a training run. Raises ValueError for settings that are not planned, or that cannot train."""
    for name, legal in PLANNED.items():
        block, field = name.split(".")
        value = getattr(getattr(cfg, block), field)
        if value != legal:
            raise ValueError(f"--{name} {value}: preflight does not plan this program; legal: {legal}")
    sampling = sampling_of(cfg.sampling, cfg.batches.num_generations, stop)
    return keep_support(sampling, cfg.sampling.support, config.vocab_size)


@partial(jax.jit, static_argnames="lm")
def _prefill(lm, params: Params, frozen: Params, prompts: sampler.DevicePrompts, sampling: Sampling):
    """The first part of `sample_on_devices`, for figures of its own."""
    return sampler.prefill(sampler.bind_params(lm, params, frozen), prompts, sampling)


def state_shapes(
    cfg: Any, config: DecoderConfig, mesh: jax.sharding.Mesh, optimizer: Any
) -> tuple[TrainState, Shardings]:
    """The state at the start of a run, and its shardings."""
    stored = jnp.dtype(models.stored_dtype(cfg.weights))
    loaded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), decoder.abstract(config))
    split = partial(models.trained_and_frozen, config=config, weights=cfg.weights)
    params, frozen = jax.eval_shape(split, {"decoder": loaded})
    coefficients = controllers.initial_coefficients(cfg.controllers, cfg.kl_coef, cfg.kl_in_reward)
    key = jax.eval_shape(partial(jax.random.key, 0))
    state = TrainState(0, params, jax.eval_shape(optimizer.init, params), key, frozen=frozen)
    state = state.replace(coefficients=jax.eval_shape(lambda: coefficients))
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload)

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "shape") else x

    return jax.tree.map(place, state, shardings.state), shardings


def prompt_shapes(mesh: jax.sharding.Mesh, count: int, tokens: int) -> sampler.DevicePrompts:
    """As `sampler.to_device` returns prompts that `train.mesh.shard_prompts` placed."""

    def placed(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(mesh, ("rollout_rows", *[None] * (len(shape) - 1)), shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return sampler.DevicePrompts(
        tokens=placed((count, tokens), jnp.int32),
        mask=placed((count, tokens), bool),
        number=placed((count,), jnp.int32),
        step=jax.ShapeDtypeStruct((count,), jnp.int32),
        version=jax.ShapeDtypeStruct((), jnp.int32),
        requests=None,
        facts=None,
    )


def scored(needs: set[str], traj: Trajectory) -> Trajectory:
    """A rollout with the fields that annotate and score fill, all 0."""
    rows = jnp.zeros(len(traj.mask))
    fields = {name: rows if name == "baseline" else jnp.zeros_like(traj.logp) for name in needs}
    return traj.replace(rewards=jnp.zeros_like(traj.logp), scores=rows[:, None], **fields)


def minibatch_shapes(step: grpo.Step, state: TrainState, minibatches: int, traj: Trajectory) -> Any:
    """What `learn` hands to an update."""
    batch = jax.eval_shape(step.credit, traj, state.coefficients)
    batch = jax.eval_shape(
        lambda whole: jax.tree.map(lambda x: x[: len(x) // minibatches] if x.ndim else x, whole), batch
    )
    return batch.replace(coefficients=batch.coefficients | {"at_old_policy": jax.ShapeDtypeStruct((), jnp.float32)})


def calls_of_scoring(cfg: Any, config: DecoderConfig, mesh: jax.sharding.Mesh) -> int:
    """In how many calls a rollout is annotated."""
    lengths = (cfg.max_prompt_tokens, cfg.sampling.max_tokens)
    rows = cfg.batches.prompts * cfg.batches.num_generations
    return -(-rows // train.annotate_rows(cfg.batches, config, *lengths, mesh))


def sizes_of(cfg: Any, config: DecoderConfig, mesh: jax.sharding.Mesh, chip: Chip | None = None) -> Sizes:
    """How much a step samples and learns from.

    chip: of a mesh without devices.
    """
    algorithm = grpo.with_settings(grpo.named_algorithm(cfg), cfg, config)
    lengths = (cfg.max_prompt_tokens, cfg.sampling.max_tokens)
    return Sizes(
        cfg.batches.prompts,
        cfg.batches.num_generations,
        *lengths,
        pieces=micro_batches.cut(config, cfg.batches, *lengths, mesh, chip),
        scored=1 + ("old_logp" in algorithm.needs),
        updates=cfg.batches.epochs * cfg.batches.minibatches,
        epochs=cfg.batches.epochs,
    )
