"""Process reward models: is each step of a solution right? (arXiv:2305.20050; labels by rollouts, arXiv:2312.08935)

    L = (1/N) Σ -y log σ(z_t) - (1 - y) log σ(-z_t)        over the N labelled steps of the whole batch

`step_ends` marks the token at which a step is judged and `rewards` holds its label y there: 0, 1 or between. NaN is no
label. To train on last steps alone, mark only those. An answer's score from its steps: see `ops.ranking`.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.algorithms.common.pairs import zero_masked
from rljax.ops.ranking import step_cross_entropy
from rljax.ops.weights import token_mean
from rljax.types import Batch, Objective, Trajectory


def process_reward_model(step_logits: Callable) -> Objective:
    """An objective over a `Trajectory`. `step_logits`: (params, frozen, trajectory) -> [B T], log-odds of "right"."""

    def prepare(params, frozen, traj: Trajectory, key) -> Batch:
        labelled = traj.mask & traj.step_ends & ~jnp.isnan(traj.rewards)
        label = jnp.where(labelled, traj.rewards, 0.0)
        traj = zero_masked(traj).replace(rewards=label)
        return Batch(traj, advantages=label, mask=labelled, returns=label, weight=token_mean(labelled))

    def loss(params, frozen, batch: Batch):
        log_odds = jnp.where(batch.mask, step_logits(params, frozen, batch.traj), 0.0)
        terms = step_cross_entropy(log_odds, batch.returns)
        right = batch.mask & ((log_odds > 0) == (batch.returns > 0.5))
        metrics = {"accuracy": (right.sum().astype(float), batch.mask.sum().astype(float))}
        return jnp.where(batch.mask, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)
