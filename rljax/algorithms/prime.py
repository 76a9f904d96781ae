"""PRIME: process rewards from a model that was trained on outcomes alone (arXiv:2502.01456).

    implicit_prm    L = -(1/N) Σ_i [o_i log σ(r_φ(y_i)) + (1 - o_i) log(1 - σ(r_φ(y_i)))]      r_φ(y) = Σ_t r_φ(y_t)
    prime           Â_it = Σ_{s>=t} γ^{s-t} (r_φ(y_is) - b_i) + R_i - mean_{j≠i} R_j           b_i = mean_{j≠i} r̄_φ(y_j)

r_φ(y_t) = β log π_φ(y_t | y_<t)/π_ref(y_t | y_<t), and r̄_φ is its mean over a completion's tokens. π_φ is a language
model too, trained on the policy's own completions and their outcomes o before it rates them. Its log-probs are in
`traj.teacher_logp`, as a teacher's would be. The baseline b is subtracted at every token, so that by its sign it favors
short completions or long ones. The policy's loss is PPO's clip. The paper's code scales the process rewards by K/(K -
1) before it subtracts the mean over all K completions, and whitens Â; the paper's equation 5 does not. Left out: only
prompts with an accuracy between 0.2 and 0.8 are kept.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_rewards, require
from rljax.algorithms.common.pairs import unpaired_objective
from rljax.algorithms.common.wrappers import with_needs
from rljax.algorithms.dapo import dapo
from rljax.ops import groups, preferences
from rljax.ops.returns import discounted_returns
from rljax.ops.shapes import Scalar
from rljax.types import Algorithm, Batch, Objective, PolicyFn


def prime(beta: float = 0.05, gamma: Scalar = 1.0, low: float = 0.2, high: float = 0.2) -> Algorithm:
    """PRIME's policy. A row alone in its group has no baseline."""

    def credit(traj, coefficients):
        require(traj, "group")
        rewards, valid = outcome_rewards(traj)
        mask = traj.mask & valid[:, None]
        process = jnp.where(mask, beta * (traj.teacher_logp - traj.ref_logp), 0.0)
        mean_process = process.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
        process_baseline = groups.leave_one_out_mean(mean_process, traj.group, valid)
        outcome = rewards - groups.leave_one_out_mean(rewards, traj.group, valid)
        returns = discounted_returns(process - process_baseline[:, None], mask, gamma)
        advantages = jnp.where(mask, returns + outcome[:, None], 0.0)
        return Batch(traj, advantages, mask, coefficients=coefficients)

    return with_needs(dapo(low, high), "teacher_logp", "ref_logp", credit=credit, group_signal=None)


def implicit_prm(policy: PolicyFn, beta: float = 0.05) -> Objective:
    """PRIME's reward model: cross entropy of outcomes, an objective over `Unpaired` (desirable: correct)."""

    def no_preparation(evaluate, batch, present):
        return batch

    def term(log_ratio, batch):
        return preferences.bco_loss(log_ratio, batch.desirable, 0.0, beta)

    return unpaired_objective(policy, term, no_preparation, beta)
