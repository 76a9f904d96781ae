"""The objective of a policy and an algorithm: the only place where the two meet."""

from functools import partial

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.train.metrics import policy_metrics
from rljax.types import (
    Algorithm,
    Array,
    Batch,
    MapRowsFn,
    Metrics,
    Objective,
    Params,
    PolicyFn,
    PolicyOutput,
    all_at_once,
    check_shapes,
    zero_masked,
)


def policy_objective(policy: PolicyFn, algorithm: Algorithm) -> Objective:
    """The scalar Σ weight · loss of a policy, which is a function (params, frozen, trajectory) -> PolicyOutput.

    Values at masked columns are replaced by zeros *before* the loss (an exp of garbage would poison the gradient even
    where its value is dropped), and the terms are masked again afterwards.

    Where `coefficients["at_old_policy"]` is 1 (`train.update.learn`) the policy still is the old one: `old_logp` is
    then what this very pass computes, so that ratios to it are exactly 1.
    """

    def prepare(params: Params, frozen: Params, batch: Batch, key: Array, map_rows: MapRowsFn = all_at_once) -> Batch:
        check_shapes(batch)
        batch = _zero_masked_batch(batch)
        weight = algorithm.weights(batch.mask, batch.traj.segments, batch.traj.group)
        batch = batch.replace(weight=weight)
        if algorithm.prepare is None:
            return batch
        output = map_rows(partial(policy, params, frozen), batch.traj)
        output = _zero_masked_output(output, batch.mask)
        return algorithm.prepare(output, _at_old_policy(output, batch), key)

    def loss(params: Params, frozen: Params, batch: Batch):
        output = _zero_masked_output(policy(params, frozen, batch.traj), batch.mask)
        batch = _at_old_policy(output, batch)
        terms, own_metrics = _check_loss(algorithm.loss(output, batch), batch)
        values = {**policy_metrics(output, batch), **own_metrics}
        count = batch.mask.sum().astype(float)
        metrics = {name: _reduce(name, value, batch.mask, count) for name, value in values.items()}
        return jnp.where(batch.mask, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)


def _at_old_policy(output: PolicyOutput, batch: Batch) -> Batch:
    """The batch whose `old_logp`, if it has one, is the policy's own where the policy is the old one."""
    same = batch.coefficients.get("at_old_policy")
    if same is None or batch.traj.old_logp is None:
        return batch
    old_logp = jnp.where(same > 0, stop_gradient(output.logp), batch.traj.old_logp)
    return batch.replace(traj=batch.traj.replace(old_logp=old_logp))


def _check_loss(result: tuple, batch: Batch) -> tuple[Array, Metrics]:
    """What a loss returned. Raises ValueError unless it is (terms [B T], metrics)."""
    if not isinstance(result, tuple):
        raise ValueError("a loss returns (terms [B, T], metrics), metrics being a dict that may be empty")
    terms, metrics = result
    if terms.shape != batch.mask.shape:
        raise ValueError(
            f"a loss is unreduced: it must return {batch.mask.shape}, one term a decision, not {terms.shape}"
        )
    return terms, metrics


def _zero_masked_output(output: PolicyOutput, mask: Array) -> PolicyOutput:
    """The output with zeros at masked columns: ratios are 1 there."""
    fields = {name: value for name, value in vars(output).items() if value is not None}
    return output.replace(**{name: jnp.where(mask, value, 0.0) for name, value in fields.items()})


def _zero_masked_batch(batch: Batch) -> Batch:
    """The batch with zeros (temperature: ones) at masked columns of every [B T] number that a loss may read."""
    advantages = jnp.where(batch.mask, batch.advantages, 0.0)
    returns = None if batch.returns is None else jnp.where(batch.mask, batch.returns, 0.0)
    return batch.replace(traj=zero_masked(batch.traj, batch.mask), advantages=advantages, returns=returns)


def _reduce(name: str, value: Array, mask: Array, count: Array) -> tuple[Array, Array]:
    """(sum, count) over the mask; for *_max and *_min the extremum, as (extremum, 1)."""
    if name.endswith("_max"):
        return jnp.where(mask, value, -jnp.inf).max(), jnp.ones(())
    if name.endswith("_min"):
        return jnp.where(mask, value, jnp.inf).min(), jnp.ones(())
    return jnp.where(mask, value, 0.0).sum(), count
