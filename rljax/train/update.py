"""One optimizer step: prepare, cut into micro-batches, accumulate gradients, apply. Jitted, donated, sharded."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rljax.ops.dtypes import at_least_float32, cast_like
from rljax.ops.statistics import nan_where_none
from rljax.train.mesh import Shardings, shard_rows
from rljax.train.metrics import average_metrics
from rljax.types import Array, Objective, Params, TrainState

UpdateFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]  # (state, batch) -> (state, metrics)

# What no update changes. `step` and `cursor` may be arrays or Python numbers: in the jitted call both would compile.
NOT_UPDATED = {"frozen": None, "step": None, "cursor": None}


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    shardings: Shardings | None = None,
) -> UpdateFn:
    """update(state, batch) -> (state, metrics). The old state's buffers are donated, except those of `frozen`.

    Weights are fixed over the whole batch before it is cut, so gradients are plain sums and do not depend on
    `micro_batches` or on the mesh. What `prepare` computes of the policy is of the whole batch too, one micro-batch at
    a time. Metrics are means over the whole batch (NaN of no decision), with `loss`, `grad_norm` (before any
    clipping in the optimizer's chain) and `update_norm`. With `shardings` the state enters and leaves in them.

    Gradients are float32 or wider whatever the parameters are, and so is what the optimizer is given; its state keeps
    the dtypes that `optimizer.init` gave it.

    Coefficients that the objective updates (`Objective.state`) are taken from `state.coefficients` and come back in
    the new state. Raises ValueError where the state lacks one.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "make_update takes an Objective: policy_objective(policy, algorithm), or dpo(policy) and its like"
        )

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key, prepare_key = jax.random.split(state.key)
        batch = _with_objective_state(objective, state, batch)
        map_rows = partial(map_micro_batches, micro_batches=micro_batches)
        batch = objective.prepare(state.params, frozen, batch, prepare_key, map_rows)
        loss, metrics, grads = accumulate_gradients(objective, state.params, frozen, batch, micro_batches, shardings)
        opt_state = state.opt_state
        if shardings is not None:  # without, this would commit the new state to its device: another compilation
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)  # it may be offloaded to the host
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        opt_state = cast_like(new_opt_state, opt_state)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        coefficients = state.coefficients | {name: batch.coefficients[name] for name in objective.state}
        return state.replace(params=params, opt_state=opt_state, key=key, coefficients=coefficients), metrics

    return jit_update(step, shardings)


def _with_objective_state(objective: Objective, state: TrainState, batch: Any) -> Any:
    """The batch with the coefficients that the objective carries from update to update."""
    missing = [name for name in objective.state if name not in state.coefficients]
    if missing:
        raise ValueError(
            f"this objective carries {', '.join(objective.state)} from one update to the next: "
            f"put first values of {', '.join(missing)} in TrainState.coefficients"
        )
    if not objective.state:
        return batch
    carried = {name: state.coefficients[name] for name in objective.state}
    return batch.replace(coefficients=batch.coefficients | carried)


def jit_update(step: Callable, shardings: Shardings | None) -> UpdateFn:
    """update(state, batch) from step(state, frozen, batch): jitted, the old state donated, the new in its shardings."""
    if shardings is None:
        jitted = jax.jit(step, donate_argnums=0)
    else:
        updated = shardings.state.replace(**NOT_UPDATED)
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(updated, shardings.state.frozen, None),
            out_shardings=(updated, shardings.replicated),
        )

    def update(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        if shardings is not None:
            batch = shard_rows(shardings, batch)
        kept = jax.tree.map(jnp.copy, state.coefficients)  # a batch may hold the same arrays: they are not donated
        new, metrics = jitted(state.replace(**NOT_UPDATED, coefficients=kept), state.frozen, batch)
        return new.replace(**{name: getattr(state, name) for name in NOT_UPDATED}), metrics

    def lower(state: TrainState, batch: Any):
        """The program of a call, for a state and a batch of shapes."""
        return jitted.lower(state.replace(**NOT_UPDATED), state.frozen, batch)

    update.jitted = jitted
    update.lower = lower
    return update


# --------------------------------------------------------------------------------------------------- micro-batches


def accumulate_gradients(
    objective: Objective, params: Params, frozen: Params, batch: Any, micro_batches: int, shardings: Shardings | None
) -> tuple[Array, dict[str, Array], Params]:
    """Loss, metrics and gradients of the whole batch, computed one micro-batch at a time.

    Half-precision parameters are differentiated as float32 copies: a gradient by the parameters themselves would be
    rounded to their dtype in each micro-batch. The loss sees the same numbers; policies compute in the dtype that they
    cast to (`DecoderConfig.dtype`). It costs 4 bytes a parameter for the sum of gradients instead of 2, and, where the
    compiler does not cast at each use, 4 more for the copies.
    """

    def value_and_grad(rows):
        return jax.value_and_grad(objective.loss, has_aux=True)(at_least_float32(params), frozen, rows)

    def keep_sharding(grads):
        return grads if shardings is None else constrain_shardings(grads, shardings.state.params)

    if micro_batches == 1:
        (loss, metrics), grads = value_and_grad(batch)
        metrics = {name: _mean(total, count) for name, (total, count) in metrics.items()}
        return loss, metrics, keep_sharding(grads)

    rows, shared = _cut(batch, micro_batches)

    def add_micro_batch(sums, micro_rows):
        loss_sum, grad_sum = sums
        (loss, metrics), grads = value_and_grad(_join(micro_rows, shared))
        grad_sum = keep_sharding(jax.tree.map(jnp.add, grad_sum, grads))
        return (loss_sum + loss, grad_sum), metrics

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, at_least_float32(params)))
    (loss, grads), metrics = jax.lax.scan(add_micro_batch, zeros, rows)
    metrics = {name: _reduce_micro_batches(name, sums, counts) for name, (sums, counts) in metrics.items()}
    return loss, metrics, grads


def sum_over_micro_batches(f: Callable[[Any], Any], batch: Any, micro_batches: int) -> Any:
    """Σ f(micro-batch) for a pytree of scalars. Differentiable: the backward pass computes each micro-batch again."""
    if micro_batches == 1:
        return f(batch)
    rows, shared = _cut(batch, micro_batches)
    of_micro_batch = jax.checkpoint(lambda micro_rows: f(_join(micro_rows, shared)))
    return jax.tree.map(lambda terms: terms.sum(axis=0), jax.lax.map(of_micro_batch, rows))


def map_micro_batches(f: Callable[[Any], Any], rows: Any, micro_batches: int) -> Any:
    """f(rows), whose leaves are [B ...] as those of `rows` are, computed one micro-batch at a time."""
    if micro_batches == 1:
        return f(rows)
    cut, shared = _cut(rows, micro_batches)
    pieces = jax.lax.map(lambda micro_rows: f(_join(micro_rows, shared)), cut)
    groups = _number_of_groups(rows)

    def unfold(x: Array) -> Array:
        by_group = x.reshape(micro_batches, groups // micro_batches, -1, *x.shape[2:])
        return jnp.swapaxes(by_group, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(unfold, pieces)


def constrain_shardings(tree: Any, shardings: Any) -> Any:
    """The tree with each leaf constrained to its sharding, inside a compiled function."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _reduce_micro_batches(name: str, values: Array, counts: Array) -> Array:
    if name.endswith("_max"):
        return values.max()
    if name.endswith("_min"):
        return values.min()
    return _mean(values.sum(), counts.sum())


def _mean(total: Array, count: Array) -> Array:
    """total/count; NaN where nothing was counted."""
    return nan_where_none(total / jnp.maximum(count, 1), count)


def _cut(batch: Any, micro_batches: int) -> tuple[list, tuple]:
    """Leaves with rows, as [M B/M ...]; and the scalars, which every micro-batch shares.

    Micro-batch m takes rows m, m + M, ...: rows that are laid out contiguously over devices stay where they are. Where
    groups of rows share a prefix (`Trajectory.prefix`), it takes groups m, m + M, ...
    """
    leaves, tree = jax.tree.flatten(batch)
    groups = _number_of_groups(batch)
    for rows in {leaf.shape[0] for leaf in leaves if jnp.ndim(leaf)}:
        check_divisible(rows, groups, "groups")
    check_divisible(groups, micro_batches, "micro-batches")

    def fold(x: Array) -> Array:
        by_group = x.reshape(groups // micro_batches, micro_batches, len(x) // groups, *x.shape[1:])
        return jnp.swapaxes(by_group, 0, 1).reshape(micro_batches, len(x) // micro_batches, *x.shape[1:])

    rows = [fold(leaf) if jnp.ndim(leaf) else None for leaf in leaves]
    scalars = [None if jnp.ndim(leaf) else leaf for leaf in leaves]
    return rows, (tree, scalars)


def _number_of_groups(batch: Any) -> int:
    """Rows that share a prefix are a group, with one row of `Trajectory.prefix`; else each row is one."""
    return min(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))


def _join(rows: list, shared: tuple) -> Any:
    """The batch of one micro-batch's rows and the scalars that all share."""
    tree, scalars = shared
    leaves = [scalar if row is None else row for row, scalar in zip(rows, scalars, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def check_divisible(rows: int, pieces: int, name: str) -> None:
    """Raise ValueError, listing what is legal, unless `rows` divide into `pieces`; `name`: of the pieces."""
    if rows % pieces:
        legal = [m for m in range(1, rows + 1) if rows % m == 0]
        raise ValueError(f"{rows} rows do not divide into {pieces} {name}; legal: {legal}")


# ------------------------------------------------------------------------------------------- updates of one rollout


def learn(
    update: UpdateFn,
    state: TrainState,
    batch: Any,
    epochs: int = 1,
    num_minibatches: int = 1,
    stop_kl: float | None = None,
    at_old_policy: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """All updates of one rollout: `epochs` passes in `num_minibatches` minibatches; metrics averaged over them.

    Adds the metrics `sampler_gap` and `clip_fraction_first`, which are `logp_diff_max` and `clip_fraction` of the first
    update, where trainer and sampler have the same parameters (without what a method drops whatever its ratio is); and
    with `stop_kl` `updates`, the number of them.

    Args:
      at_old_policy: the batch's `old_logp`, if it has one, was computed with the parameters of `state`: the first
        update takes it from its own pass instead. Two programs of one policy round differently, in bfloat16 by more
        than the clip range of some methods; against its own log-probs no ratio leaves it.
      stop_kl: stop after an update that found the policy that far from the old one, in nats a decision: `kl_old`, or
        without `old_logp` `kl_behavior`. PPO implementations take 1.5 times their target KL.

    Raises ValueError for `stop_kl` where the update measures neither.
    """
    key, shuffle_key = jax.random.split(state.key)
    state = state.replace(key=key)
    logged = []
    for minibatch in minibatches(shuffle_key, batch, epochs, num_minibatches):
        if at_old_policy:
            is_first = jnp.float32(not logged)
            minibatch = minibatch.replace(coefficients=minibatch.coefficients | {"at_old_policy": is_first})
        state, metrics = update(state, minibatch)
        logged.append(metrics)
        if stop_kl is not None and _kl_of_update(metrics) > stop_kl:
            break
    averaged = average_metrics(logged)
    if "logp_diff_max" in logged[0]:
        averaged["sampler_gap"] = logged[0]["logp_diff_max"]
    if "clip_fraction" in logged[0]:
        parts = ("clip_fraction_low", "clip_fraction_high") if "dropped" in logged[0] else ("clip_fraction",)
        averaged["clip_fraction_first"] = sum(float(logged[0][part]) for part in parts)
    if stop_kl is not None:
        averaged["updates"] = len(logged)
    return state, averaged


def _kl_of_update(metrics: dict[str, Any]) -> Array:
    """The KL between the policy that ratios are taken against and the one that an update began with."""
    for name in ("kl_old", "kl_behavior"):
        if name in metrics:
            return metrics[name]
    raise ValueError("stop_kl compares with the metric kl_old or kl_behavior, and this objective has neither")


def minibatches(key: Array, batch: Any, epochs: int = 1, num_minibatches: int = 1) -> Iterator[Any]:
    """`epochs` passes over the batch in `num_minibatches` minibatches of whole rows, shuffled in each pass.

    Raises ValueError where the rows do not divide.
    """
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))
    check_divisible(rows, num_minibatches, "minibatches")
    for epoch in range(epochs):
        if num_minibatches == 1:
            yield batch
            continue
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        for taken in order.reshape(num_minibatches, -1):
            yield _take(batch, taken)


@jax.jit
def _take(batch: Any, rows: Array) -> Any:
    return jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, batch)
