"""MiniLLM: the reverse KL of whole completions, by a policy gradient of less variance (arXiv:2306.08543).

    ∇L = Σ_t w_t (∇ KL(q(· | s_t) ‖ p(· | s_t)) - R_{t+1} ∇ log q(a_t | s_t)),   averaged over the completions
    R_{t+1} = Σ_{t' > t} log p(a_t')/q(a_t')        w_t = q(a_t)/p̃(a_t)

p is the teacher, q the student, p̃ the policy that sampled: the student, or the mixture (1 - α) q + α p of the paper,
α = 0.2 (`models.mixtures.arithmetic_mixture`); `traj.logp` holds its log-probs. The first term is exact over the
vocabulary (single-step decomposition); the second is what a token changes for later ones. Length normalization divides
R_{t+1} by the number of later decisions. Left out: the paper's clipping of ratios and its pretraining loss.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.distillation import distillation_objective
from rljax.ops.distillation import EstimatorFn, TokenComparison, full_vocabulary
from rljax.ops.ratios import importance_ratio
from rljax.ops.returns import discounted_returns
from rljax.ops.sequences import last_decision
from rljax.ops.shapes import PerToken
from rljax.ops.weights import seq_mean_token_sum
from rljax.types import CompareFn, Distillation, Objective, Trajectory, WeightsFn


def minillm(
    compare: CompareFn,
    length_normalized: bool = True,
    estimator: EstimatorFn = full_vocabulary,
    weights: WeightsFn = seq_mean_token_sum,
) -> Objective:
    """MiniLLM over `Distillation`. `estimator` computes the first term.

    Without `length_normalized` the gradient on the student's own completions is that of KL(q ‖ p) of whole completions,
    without bias. That is a sum over tokens, so it also pays to end early, which the normalization is against.
    """

    def term(found: TokenComparison, batch: Distillation):
        logp = stop_gradient(found.logp)
        later = later_log_ratios(found.teacher_logp - logp, batch.traj, length_normalized)
        weight = importance_ratio(logp, batch.traj.logp)
        return weight * (found.divergence - later * found.logp)

    return distillation_objective(compare, estimator(1.0), weights, term)


def later_log_ratios(log_ratio: PerToken, traj: Trajectory, mean: bool) -> PerToken:
    """R_{t+1}: the sum, or the mean, of the log ratios of the later decisions of the same completion."""
    mask = traj.mask
    goes_on = jnp.where(last_decision(mask, traj.segments), 0.0, 1.0)
    total = discounted_returns(log_ratio, mask, goes_on) - jnp.where(mask, log_ratio, 0.0)
    if not mean:
        return total
    count = discounted_returns(jnp.ones_like(log_ratio), mask, goes_on) - 1.0
    return total / jnp.maximum(count, 1.0)
