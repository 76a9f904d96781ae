"""Parts of a training run that is one compiled function: updates in a `scan` where `update.learn` is a Python loop."""

from typing import Any

import jax
import jax.numpy as jnp

from rljax.train.update import UpdateFn, check_divisible
from rljax.types import Array, Batch, Params, TrainState


def flatten_time(batch: Batch) -> Batch:
    """[B T ...] -> [B·T 1 ...]: every decision as a row of its own. For policies without memory."""

    def flatten(x: Array) -> Array:
        return x.reshape(-1, 1, *x.shape[2:])

    values = batch.traj.values
    if values is not None:
        values = jnp.stack([values[:, :-1], values[:, 1:]], axis=-1).reshape(-1, 2)
    without_values = batch.traj.replace(values=None, group=None)
    flat = jax.tree.map(flatten, batch.replace(traj=without_values, coefficients={}))
    return flat.replace(traj=flat.traj.replace(values=values), coefficients=batch.coefficients)


def scan_updates(
    update: UpdateFn,
    state: TrainState,
    batch: Any,
    epochs: int = 1,
    num_minibatches: int = 1,
    keep: tuple[str, ...] = (),
) -> tuple[TrainState, dict[str, Array]]:
    """`epochs` passes over the batch in `num_minibatches` minibatches of whole rows, shuffled in each pass.

    keep: the metrics to average over the updates. Metrics that are not kept are not computed.

    Raises ValueError where the rows do not divide.
    """
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))
    check_divisible(rows, num_minibatches, "minibatches")
    leaves, tree = jax.tree.flatten(batch)
    key, order_key, update_key = jax.random.split(state.key, 3)

    def step(state, inputs):
        key, taken = inputs
        minibatch = [whole if part is None else part for whole, part in zip(leaves, taken, strict=True)]
        state, metrics = update(state.replace(key=key), jax.tree.unflatten(tree, minibatch))
        return state.replace(key=None), {name: metrics[name] for name in keep}

    def split(x, order):
        """[minibatches rows ...]; None for what every minibatch takes whole."""
        if num_minibatches == 1 or not jnp.ndim(x):
            return None
        return x[order].reshape(num_minibatches, -1, *x.shape[1:])

    def epoch(state, inputs):
        keys, order = inputs
        return jax.lax.scan(step, state, (keys, [split(x, order) for x in leaves]))

    keys = jax.random.split(update_key, (epochs, num_minibatches))
    orders = permutations(order_key, epochs, rows)
    state, metrics = jax.lax.scan(epoch, state.replace(key=None), (keys, orders))
    return state.replace(key=key), jax.tree.map(jnp.mean, metrics)


def update_subtree(update: UpdateFn, name: str) -> UpdateFn:
    """The update of `params[name]` alone, with the optimizer state `opt_state[name]`.

    The policy finds the other parameters in `frozen`. For methods that fit the critic separately from the actor: with
    one optimizer for both, the part without a gradient would still move by its momentum.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        others = {other: params for other, params in state.params.items() if other != name}
        own = state.replace(params={name: state.params[name]}, frozen=others, opt_state=state.opt_state[name])
        updated, metrics = update(own, batch)
        params = {**others, **updated.params}
        opt_state = {**state.opt_state, name: updated.opt_state}
        return state.replace(params=params, opt_state=opt_state, key=updated.key), metrics

    return step


def polyak_update(target: Params, params: Params, step_size: float | Array = 1.0, due: bool | Array = True) -> Params:
    """The target network after a Polyak step where `due`, else as it was; a step size of 1 copies the parameters.

    target ← (1 - step_size) target + step_size params
    """

    def interpolated():
        return jax.tree.map(lambda old, new: (1.0 - step_size) * old + step_size * new, target, params)

    return jax.lax.cond(due, interpolated, lambda: target)


def permutations(key: Array, count: int, rows: int) -> Array:
    """[count rows] random permutations of 0 .. rows - 1.

    Sorts random bits whose lowest bits are the row's number: on a CPU a quarter of the time of
    `jax.random.permutation`, which sorts pairs. Ties of the random bits are in the order of rows.
    """
    low = jnp.uint32(2 ** (rows - 1).bit_length() - 1)
    numbered = (jax.random.bits(key, (count, rows)) & ~low) | jnp.arange(rows, dtype=jnp.uint32)[None]
    return (jnp.sort(numbered, axis=1) & low).astype(jnp.int32)
