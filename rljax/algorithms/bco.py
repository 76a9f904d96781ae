"""BCO: binary classifier optimization of unpaired completions (arXiv:2404.04656).

    L = (1/N) Σ_i -log σ(±(β Δ_i - δ))        + where desirable, - where not
    δ = running mean of all β Δ so far, including this batch

The running mean is state: `TrainState(coefficients=initial_state())` starts it, and every update carries it on, so that
it is the same however the data are cut into batches and minibatches. Left out: density-ratio weights.
"""

import jax.numpy as jnp

from rljax.algorithms.common.pairs import log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.types import Array, Objective, PolicyFn

STATE = ("reward_mean", "rewards_seen")


def initial_state() -> dict[str, Array]:
    """The running mean before any completion was seen: the first `TrainState.coefficients`."""
    return {name: jnp.zeros(()) for name in STATE}


def bco(policy: PolicyFn, beta: float = 0.1) -> Objective:
    """An objective over `Unpaired` that carries the running mean from update to update."""

    def update_running_mean(evaluate, batch, present):
        mean = batch.coefficients["reward_mean"]
        count = batch.coefficients["rewards_seen"]
        rewards = jnp.where(present, beta * evaluate(batch.traj).log_ratio, 0.0)
        count = count + present.sum()
        moved = mean + (rewards - jnp.where(present, mean, 0.0)).sum() / jnp.maximum(count, 1.0)
        return batch.replace(coefficients=batch.coefficients | {"reward_mean": moved, "rewards_seen": count})

    def term(log_ratio, batch):
        return preferences.bco_loss(log_ratio, batch.desirable, batch.coefficients["reward_mean"], beta)

    objective = unpaired_objective(policy, term, update_running_mean, beta)
    return log_coefficients(objective, "reward_mean")._replace(state=STATE)
