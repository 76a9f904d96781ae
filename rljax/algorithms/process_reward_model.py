"""Process reward models: is each step of a solution correct? (arXiv:2305.20050; labels by rollouts, arXiv:2312.08935)

    L = (1/N) Σ -y log σ(z_t) - (1 - y) log σ(-z_t)        over the N labeled steps of the whole batch

`step_ends` marks the token at which a step is labeled and `rewards` holds its label y there, in [0, 1]. NaN is no
label. To train on last steps alone, mark only those. A completion's score from its steps: see `ops.ranking`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from rljax.algorithms.common.pairs import checked_zero_masked
from rljax.ops.ranking import step_cross_entropy
from rljax.ops.weights import token_mean
from rljax.types import Batch, Objective, Params, Trajectory, all_at_once


def process_reward_model(step_logits: Callable[[Params, Params, Trajectory], Array]) -> Objective:
    """An objective over a `Trajectory`. `step_logits`: (params, frozen, trajectory) -> [B T], log-odds of "correct"."""

    def prepare(params, frozen, traj: Trajectory, key, map_rows=all_at_once) -> Batch:
        labeled = traj.mask & traj.step_ends & ~jnp.isnan(traj.rewards)
        label = jnp.where(labeled, traj.rewards, 0.0)
        traj = checked_zero_masked(traj).replace(rewards=label)
        return Batch(traj, advantages=label, mask=labeled, returns=label, weight=token_mean(labeled))

    def loss(params, frozen, batch: Batch):
        log_odds = jnp.where(batch.mask, step_logits(params, frozen, batch.traj), 0.0)
        terms = step_cross_entropy(log_odds, batch.returns)
        correct = batch.mask & ((log_odds > 0) == (batch.returns > 0.5))
        metrics = {"accuracy": (correct.sum().astype(float), batch.mask.sum().astype(float))}
        return jnp.where(batch.mask, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)
