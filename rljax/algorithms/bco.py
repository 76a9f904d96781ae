"""BCO: binary classifier optimization of unpaired completions (arXiv:2404.04656).

    L = (1/N) Σ_i -log σ(±(β Δ_i - δ))        + where desirable, - where not
    δ = running mean of all β Δ so far, including this batch

The running mean is state: `coefficients` carries `reward_mean` and `rewards_seen` (0 and 0 at first), metrics with the
same names return their new values, and the loop passes them to the next batch. Left out: density-ratio weights.
"""

import jax.numpy as jnp

from rljax.algorithms.common.pairs import log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.types import Objective, PolicyFn

STATE = ("reward_mean", "rewards_seen")


def bco(policy: PolicyFn, beta: float = 0.1) -> Objective:
    """An objective over `Unpaired` whose `coefficients` hold the running mean; without, it starts here."""

    def update_running_mean(evaluate, batch, present):
        mean, count = (batch.coefficients.get(name, jnp.zeros(())) for name in STATE)
        rewards = jnp.where(present, beta * evaluate(batch.traj).log_ratio, 0.0)
        count = count + present.sum()
        moved = mean + (rewards - jnp.where(present, mean, 0.0)).sum() / jnp.maximum(count, 1.0)
        return batch.replace(coefficients=batch.coefficients | {"reward_mean": moved, "rewards_seen": count})

    def term(log_ratio, batch):
        return preferences.bco_loss(log_ratio, batch.desirable, batch.coefficients["reward_mean"], beta)

    return log_coefficients(unpaired_objective(policy, term, update_running_mean, beta), *STATE)
