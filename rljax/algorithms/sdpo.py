"""SDPO: the model, shown feedback on its attempt, teaches itself token by token (arXiv:2601.20802).

    L = (1/Σm) Σ min(ρ, c) D(p(· | x, f, y_<t), q(· | x, y_<t))        y ~ q, f the feedback, ρ = sg(q/q_old)
    D = β KL(p ‖ m) + (1 - β) KL(q ‖ m),  m = β p + (1 - β) q, of the student's k likeliest tokens and the rest

q is the student, p the same model with f in its prompt (`Distillation.teacher_view`), with the parameters
frozen["teacher"], a moving average of the student's (`models.policy.sync_reference(state, 0.05, "teacher")`). f may be
the environment's words, or a successful attempt of the same group (`successful_peers`). The defaults are those of the
authors' code. To learn from rewards too: the wrapper `distill`, with compare(...).teacher_logp.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Int

from rljax.algorithms.common.credit import old_policy_logp, outcome_rewards, require
from rljax.algorithms.common.distillation import distillation_objective
from rljax.algorithms.sdft import with_required_view
from rljax.ops.distillation import EstimatorFn, TokenComparison, top_k
from rljax.ops.ratios import importance_ratio, truncate_weights
from rljax.ops.weights import token_mean
from rljax.types import CompareFn, Distillation, Objective, Trajectory, WeightsFn


def sdpo(
    compare: CompareFn,
    beta: float = 0.5,
    cap: float = 2.0,
    estimator: EstimatorFn = top_k,
    weights: WeightsFn = token_mean,
) -> Objective:
    """SDPO over `Distillation` with `teacher_view`; rows without feedback have no decision there, and weigh nothing.

    `cap`: c, the largest importance weight. Raises ValueError for a batch without `teacher_view`.
    """

    def term(found: TokenComparison, batch: Distillation):
        ratio = importance_ratio(stop_gradient(found.logp), old_policy_logp(batch.traj))
        return truncate_weights(ratio, cap) * found.divergence

    return with_required_view(distillation_objective(compare, estimator(beta), weights, term))


def successful_peers(traj: Trajectory, threshold: float = 1.0) -> Int[Array, " B"]:
    """For each row another row of its group whose reward is at least `threshold`, the first; -1 where there is none."""
    require(traj, "group")
    rewards, valid = outcome_rewards(traj)
    successful = valid & (rewards >= threshold)
    peers = (traj.group[:, None] == traj.group[None, :]) & successful[None, :]
    peers = peers & ~jnp.eye(len(rewards), dtype=bool)
    return jnp.where(peers.any(axis=1), jnp.argmax(peers, axis=1), -1)
