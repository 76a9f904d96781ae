"""ReMax: the reward of the greedy completion as baseline (arXiv:2310.10505).

    Â_it = Σ_{t'≥t} r_it' - R(greedy completion)        L = -(1/N⁺) Σ_i Σ_t Â_it log π(a_it | s_it)

The greedy completion depends on the prompt alone, so the baseline leaves the mean of the gradient unchanged. It costs
one more decode per prompt; `traj.baseline` holds its reward, before a wrapper adds a KL or a penalty to the rewards of
the others: Â is then lower by its mean, which adds variance and no bias.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.reinforce import no_baseline, reinforce
from rljax.ops.returns import discounted_returns
from rljax.types import Algorithm, Batch


def remax() -> Algorithm:
    """ReMax. Rows whose greedy completion has no valid reward (NaN) leave the batch."""

    def credit(traj, coefficients):
        require(traj, "baseline")
        rewards, mask = decision_rewards(traj)
        mask = mask & jnp.isfinite(traj.baseline)[:, None]
        advantages = jnp.where(mask, discounted_returns(rewards, mask) - traj.baseline[:, None], 0.0)
        return Batch(traj, advantages, mask, coefficients=coefficients)

    return reinforce(no_baseline)._replace(credit=credit, needs=("baseline",))
