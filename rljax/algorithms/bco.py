"""BCO: binary classifier optimisation of answers judged one by one (arXiv:2404.04656).

    L = (1/N) Σ_i -log σ(±(β Δ_i - δ))        + where desirable, - where not
    δ = running mean of every β Δ seen so far, this batch's included

The running mean is state: `coefficients` carries `reward_mean` and `rewards_seen` (0 and 0 at first), metrics of the
same names return their new values, and the loop hands them to the next batch. Left out: density-ratio weights.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.algorithms.common.pairs import log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.types import Objective

STATE = ("reward_mean", "rewards_seen")


def bco(policy: Callable, beta: float = 0.1) -> Objective:
    """An objective over `Unpaired` whose `coefficients` hold the running mean; without, it starts here."""

    def before(look, batch, present):
        mean, seen = (batch.coefficients.get(name, jnp.zeros(())) for name in STATE)
        rewards = jnp.where(present, beta * look(batch.traj).log_ratio, 0.0)
        seen_now = seen + present.sum()
        moved = mean + (rewards - jnp.where(present, mean, 0.0)).sum() / jnp.maximum(seen_now, 1.0)
        return batch.replace(coefficients=batch.coefficients | dict(zip(STATE, (moved, seen_now), strict=True)))

    def term(ratio, batch):
        return preferences.bco_loss(ratio, batch.desirable, batch.coefficients["reward_mean"], beta)

    return log_coefficients(unpaired_objective(policy, term, before, beta), *STATE)
