"""One optimizer step: prepare, cut into micro-batches, sum gradients, step. Jitted, donated, sharded."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

from rljax.train.mesh import Shardings, shard_rows
from rljax.train.metrics import average
from rljax.types import Objective, TrainState

# What no update changes. `step` and `cursor` are now arrays, now Python numbers: in the jitted call both would compile.
LEFT_OUT = {"frozen": None, "step": None, "cursor": None}


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    shardings: Shardings | None = None,
) -> Callable:
    """update(state, batch) -> (state, metrics). The old state's buffers are donated, all but `frozen`.

    Weights are fixed over the whole batch before it is cut, so gradients do not depend on `micro_batches` or on the
    mesh: they are plain sums. Metrics are means over the whole batch, and `loss`, `grad_norm` (before any clipping in
    the optimizer's chain) and `update_norm`. With `shardings` the state enters and leaves in them.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "make_update takes an Objective: policy_objective(policy, algorithm), or dpo(policy) and its like"
        )

    def step(state: TrainState, frozen, batch):
        key, used = jax.random.split(state.key)
        batch = objective.prepare(state.params, frozen, batch, used)
        loss, metrics, grads = summed(objective, state.params, frozen, batch, micro_batches, shardings)
        opt_state = state.opt_state
        if shardings is not None:  # without, this would commit the new state to its device: another compilation
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)  # it may wait in the host's memory
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, key=key), metrics

    return compiled(step, shardings)


def compiled(step: Callable, shardings: Shardings | None) -> Callable:
    """update(state, batch) of step(state, frozen, batch): jitted, the old state donated, the new one where it was."""
    if shardings is None:
        jitted = jax.jit(step, donate_argnums=0)
    else:
        thawed = shardings.state.replace(**LEFT_OUT)
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(thawed, shardings.state.frozen, None),
            out_shardings=(thawed, shardings.replicated),
        )

    def update(state: TrainState, batch) -> tuple[TrainState, dict]:
        batch = batch if shardings is None else shard_rows(shardings, batch)
        new, metrics = jitted(state.replace(**LEFT_OUT), state.frozen, batch)
        return new.replace(**{name: getattr(state, name) for name in LEFT_OUT}), metrics

    update.jitted = jitted
    return update


def summed(objective: Objective, params, frozen, batch, micro_batches: int, shardings: Shardings | None):
    """Loss, metrics and gradients of the whole batch, a micro-batch at a time."""
    value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
    keep = (lambda g: g) if shardings is None else (lambda g: constrain(g, shardings.state.params))

    def one(total, micro):
        (loss, metrics), grads = value_and_grad(params, frozen, micro)
        loss_sum, grad_sum = total
        return (loss_sum + loss, keep(jax.tree.map(jnp.add, grad_sum, grads))), metrics

    if micro_batches == 1:
        (loss, metrics), grads = value_and_grad(params, frozen, batch)
        return loss, {k: s / jnp.maximum(n, 1) for k, (s, n) in metrics.items()}, keep(grads)

    cut, whole = _cut(batch, micro_batches)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), metrics = jax.lax.scan(lambda total, rows: one(total, _join(rows, whole)), zeros, cut)
    return loss, {name: _over_micro_batches(name, *pair) for name, pair in metrics.items()}, grads


def in_micro_batches(f: Callable, batch, micro_batches: int):
    """Σ f(micro-batch), f a pytree of scalars. Differentiable: each micro-batch is computed again on the way back."""
    if micro_batches == 1:
        return f(batch)
    cut, whole = _cut(batch, micro_batches)
    one = jax.checkpoint(lambda rows: f(_join(rows, whole)))
    return jax.tree.map(lambda terms: terms.sum(axis=0), jax.lax.map(one, cut))


def constrain(tree, shardings):
    """The tree, each leaf held to its sharding inside a compiled function."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _over_micro_batches(name: str, values, counts):
    if name.endswith("_max"):
        return values.max()
    if name.endswith("_min"):
        return values.min()
    return values.sum() / jnp.maximum(counts.sum(), 1)


def _cut(batch, micro_batches: int):
    """Leaves with rows, as [M B/M ...]; and the scalars, which every micro-batch shares.

    Micro-batch m takes rows m, m + M, ...: rows that are laid out contiguously over devices stay where they are.
    """
    leaves, tree = jax.tree.flatten(batch)
    rows = {leaf.shape[0] for leaf in leaves if jnp.ndim(leaf)}
    for n in rows:
        require_division(n, micro_batches, "micro-batches")

    def fold(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1)

    cut = [fold(leaf) if jnp.ndim(leaf) else None for leaf in leaves]
    return cut, (tree, [None if jnp.ndim(leaf) else leaf for leaf in leaves])


def require_division(rows: int, pieces: int, name: str) -> None:
    if rows % pieces:
        legal = [m for m in range(1, rows + 1) if rows % m == 0]
        raise ValueError(f"{rows} rows do not divide into {pieces} {name}; legal: {legal}")


def _join(rows: list, whole):
    tree, scalars = whole
    return jax.tree.unflatten(tree, [s if r is None else r for r, s in zip(rows, scalars, strict=True)])


def learn(
    update: Callable, state: TrainState, batch, epochs: int = 1, count: int = 1, stop_kl: float | None = None
) -> tuple[TrainState, dict]:
    """All updates of one rollout: `epochs` passes in `count` minibatches; metrics averaged over them.

    `stop_kl`: leave the loop once an update has found the policy that far from the one that sampled (`kl_behavior`,
    nats a decision; PPO implementations take 1.5 times their target KL). Adds `updates`, how many there were, and
    `sampler_gap`: `logp_diff_max` at the first of them, where trainer and sampler have the same parameters.
    """
    key, used = jax.random.split(state.key)
    state, learnt = state.replace(key=key), []
    for mini in minibatches(used, batch, epochs, count):
        state, metrics = update(state, mini)
        learnt.append(metrics)
        if stop_kl is not None and metrics["kl_behavior"] > stop_kl:
            break
    gap = {"sampler_gap": learnt[0]["logp_diff_max"]} if "logp_diff_max" in learnt[0] else {}
    count = {} if stop_kl is None else {"updates": len(learnt)}
    return state, average(learnt) | gap | count


def minibatches(key, batch, epochs: int = 1, count: int = 1) -> Iterator:
    """`epochs` passes over the batch in `count` minibatches of whole rows, shuffled anew in each pass.

    Raises ValueError where the rows do not divide.
    """
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))
    require_division(rows, count, "minibatches")
    for epoch in range(epochs):
        if count == 1:
            yield batch
            continue
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        for taken in order.reshape(count, -1):
            yield _take(batch, taken)


@jax.jit
def _take(batch, rows):
    return jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, batch)
