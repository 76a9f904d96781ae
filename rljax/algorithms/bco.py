"""BCO: binary classifier optimization of unpaired completions (arXiv:2404.04656).

    L = (1/N) Σ_i -log σ(±(β Δ_i - δ))        + where desirable, - where not
    δ = ½ (mean β Δ of the desirable + mean β Δ of the undesirable)

With r_w, r_l the rewards β Δ of a pair, the loss exceeds DPO's by a term in e^{δ - r_w} + e^{r_l - δ}, which is least
at δ = ½ (r_w + r_l): the paper's reward shift. The two classes weigh the same in it, however many completions each
has. TRL (to 1.13) took the mean of all rewards instead, which is the same for classes of one size.

The means are over all completions so far, this batch included, and a class that was never seen is left out. They are
state: `TrainState(coefficients=initial_state())` starts it, and every update carries it on, so that it is the same
however the data are cut into batches and minibatches. Left out: density-ratio weights.
"""

import jax.numpy as jnp

from rljax.algorithms.common.pairs import log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.types import Array, Objective, PolicyFn

STATE = ("desirable_mean", "desirable_seen", "undesirable_mean", "undesirable_seen")


def initial_state() -> dict[str, Array]:
    """The means before any completion was seen: the first `TrainState.coefficients`."""
    return {name: jnp.zeros(()) for name in STATE}


def running_mean(mean, count, values, rows):
    """(mean, count) of all values so far and of these `rows`."""
    moved_count = count + rows.sum()
    moved = mean + jnp.where(rows, values - mean, 0.0).sum() / jnp.maximum(moved_count, 1.0)
    return moved, moved_count


def reward_shift(state: dict[str, Array]) -> Array:
    """δ: the mean of the means of the classes that were seen, 0 before any was."""
    means = jnp.stack([state["desirable_mean"], state["undesirable_mean"]])
    seen = jnp.stack([state["desirable_seen"], state["undesirable_seen"]]) > 0
    return jnp.where(seen, means, 0.0).sum() / jnp.maximum(seen.sum(), 1)


def bco(policy: PolicyFn, beta: float = 0.1) -> Objective:
    """An objective over `Unpaired` that carries the means of both classes from update to update."""

    def update_means(evaluate, batch, present):
        before = batch.coefficients
        rewards = jnp.where(present, beta * evaluate(batch.traj).log_ratio, 0.0)
        after = {}
        for name, rows in (("desirable", present & batch.desirable), ("undesirable", present & ~batch.desirable)):
            mean, count = running_mean(before[f"{name}_mean"], before[f"{name}_seen"], rewards, rows)
            after |= {f"{name}_mean": mean, f"{name}_seen": count}
        return batch.replace(coefficients=before | after | {"reward_shift": reward_shift(after)})

    def term(log_ratio, batch):
        return preferences.bco_loss(log_ratio, batch.desirable, batch.coefficients["reward_shift"], beta)

    objective = unpaired_objective(policy, term, update_means, beta)
    return log_coefficients(objective, "reward_shift")._replace(state=STATE)
