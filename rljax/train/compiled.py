"""Pieces of a training run that is one compiled function: updates in a scan, where `update.learn` is a Python loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.train.update import require_division
from rljax.types import Batch, TrainState


def decisions(batch: Batch) -> Batch:
    """[B T ...] -> [B·T 1 ...]: every decision a row of its own, to be shuffled alone. For policies without memory."""

    def cut(x):
        return x.reshape(-1, 1, *x.shape[2:])

    values = batch.traj.values
    if values is not None:
        values = jnp.stack([values[:, :-1], values[:, 1:]], axis=-1).reshape(-1, 2)
    alone = batch.replace(traj=batch.traj.replace(values=None, group=None), coefficients={})
    alone = jax.tree.map(cut, alone)
    return alone.replace(traj=alone.traj.replace(values=values), coefficients=batch.coefficients)


def scan_updates(
    update: Callable, state: TrainState, batch, epochs: int = 1, count: int = 1, keep: tuple[str, ...] = ()
) -> tuple[TrainState, dict]:
    """`epochs` passes over the batch in `count` minibatches of whole rows, shuffled anew in each pass.

    keep: the metrics to average over the updates. What nobody keeps is not computed.

    Raises ValueError where the rows do not divide.
    """
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))
    require_division(rows, count, "minibatches")
    leaves, tree = jax.tree.flatten(batch)
    key, ordering, updating = jax.random.split(state.key, 3)

    def one(state, drawn):
        key, taken = drawn
        mini = [x if cut is None else cut for x, cut in zip(leaves, taken, strict=True)]
        state, metrics = update(state.replace(key=key), jax.tree.unflatten(tree, mini))
        return state.replace(key=None), {name: metrics[name] for name in keep}

    def epoch(state, drawn):
        keys, order = drawn
        shuffled = [x[order].reshape(count, -1, *x.shape[1:]) if jnp.ndim(x) and count > 1 else None for x in leaves]
        return jax.lax.scan(one, state, (keys, shuffled))

    drawn = jax.random.split(updating, (epochs, count)), permutations(ordering, epochs, rows)
    state, metrics = jax.lax.scan(epoch, state.replace(key=None), drawn)
    return state.replace(key=key), jax.tree.map(jnp.mean, metrics)


def of_part(update: Callable, part: str) -> Callable:
    """The update of `params[part]` with an optimizer state of its own, `opt_state[part]`; the other parts stand still.

    The policy finds them in `frozen`. For methods that fit the critic apart from the actor: with one optimizer the part
    without gradient would still move by its momentum.
    """

    def step(state: TrainState, batch) -> tuple[TrainState, dict]:
        others = {name: x for name, x in state.params.items() if name != part}
        own = state.replace(params={part: state.params[part]}, frozen=others, opt_state=state.opt_state[part])
        new, metrics = update(own, batch)
        opt_state = {**state.opt_state, part: new.opt_state}
        return state.replace(params={**others, **new.params}, opt_state=opt_state, key=new.key), metrics

    return step


def follow(target, params, share=1.0, due=True):
    """The target network: (1 - share) target + share params where `due`, else as it was. Less than 1 is Polyak's."""
    return jax.lax.cond(
        due, lambda: jax.tree.map(lambda old, new: (1.0 - share) * old + share * new, target, params), lambda: target
    )


def permutations(key, count: int, rows: int):
    """[count rows]: random orders of 0 .. rows - 1.

    Random bits with the row's number as the last ones, sorted: on a CPU a quarter of the time of
    `jax.random.permutation`, which sorts pairs. Ties of the random bits fall in the order of rows.
    """
    low = jnp.uint32(2 ** (rows - 1).bit_length() - 1)
    numbered = (jax.random.bits(key, (count, rows)) & ~low) | jnp.arange(rows, dtype=jnp.uint32)[None]
    return (jnp.sort(numbered, axis=1) & low).astype(jnp.int32)
