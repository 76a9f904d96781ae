"""Where a model and an algorithm meet, and nowhere else."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.train import diagnostics
from rljax.types import Algorithm, Batch, Objective, PolicyOutput, check_shapes


def policy_objective(policy: Callable, algorithm: Algorithm) -> Objective:
    """Σ weight · loss for a policy (params, frozen, trajectory) -> PolicyOutput.

    What stands at masked columns is replaced by zeros *before* the loss sees it (an exp of garbage would poison the
    gradient even where its value is dropped), and the terms are masked again after.
    """

    def prepare(params, frozen, batch: Batch, key) -> Batch:
        check_shapes(batch)
        batch = _neutral_batch(batch)
        segments = batch.traj.segments
        batch = batch.replace(weight=algorithm.weights(batch.mask, segments))
        if algorithm.prepare is None:
            return batch
        output = _neutral(policy(params, frozen, batch.traj), batch.mask)
        return algorithm.prepare(output, batch, key)

    def loss(params, frozen, batch: Batch):
        output = _neutral(policy(params, frozen, batch.traj), batch.mask)
        found = algorithm.loss(output, batch)
        if not isinstance(found, tuple):
            raise ValueError("a loss returns (terms [B, T], metrics), metrics being a dict that may be empty")
        terms, shown = found
        if terms.shape != batch.mask.shape:
            raise ValueError(
                f"a loss is unreduced: it must return {batch.mask.shape}, one term a decision, not {terms.shape}"
            )
        shown = {**diagnostics.policy(output, batch), **shown}
        count = batch.mask.sum().astype(float)
        metrics = {name: _summary(name, value, batch.mask, count) for name, value in shown.items()}
        return jnp.where(batch.mask, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)


def _neutral(output: PolicyOutput, mask) -> PolicyOutput:
    """The output with zeros at masked columns: ratios are 1 there."""
    fields = {k: v for k, v in vars(output).items() if v is not None}
    return output.replace(**{k: jnp.where(mask, v, 0.0) for k, v in fields.items()})


def _neutral_batch(batch: Batch) -> Batch:
    """The batch with zeros (temperature: ones) at masked columns of every [B T] number that may be read."""
    mask, traj = batch.mask, batch.traj
    names = ("logp", "old_logp", "ref_logp", "teacher_logp", "rewards", "final_values", "sum_pi_squared")
    facts = {name: jnp.where(mask, getattr(traj, name), 0.0) for name in names if getattr(traj, name) is not None}
    if traj.temperature is not None:
        facts["temperature"] = jnp.where(mask, traj.temperature, 1.0)
    if traj.values is not None:
        facts["values"] = jnp.where(jnp.pad(mask, ((0, 0), (0, 1))), traj.values, 0.0)
    if traj.dist is not None:
        facts["dist"] = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(mask, range(2, x.ndim)), x, 1.0), traj.dist)
    returns = None if batch.returns is None else jnp.where(mask, batch.returns, 0.0)
    advantages = jnp.where(mask, batch.advantages, 0.0)
    return batch.replace(traj=traj.replace(**facts), advantages=advantages, returns=returns)


def _summary(name: str, value, mask, count):
    """(sum, count) over the mask; for *_max and *_min the extremum, as (extremum, 1)."""
    if name.endswith("_max"):
        return jnp.where(mask, value, -jnp.inf).max(), jnp.ones(())
    if name.endswith("_min"):
        return jnp.where(mask, value, jnp.inf).min(), jnp.ones(())
    return jnp.where(mask, value, 0.0).sum(), count
