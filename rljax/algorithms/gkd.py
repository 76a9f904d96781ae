"""GKD: generalized knowledge distillation, on the student's completions and on a data set (arXiv:2306.13649).

    L = (1/N⁺) Σ_i (1/n_i) Σ_t D(p(· | s_t), q(· | s_t))        p the teacher, q the student
    D = β KL(p ‖ m) + (1 - β) KL(q ‖ m)        m = β p + (1 - β) q;  β = 0: KL(p ‖ q), β = 1: KL(q ‖ p)

A share λ of the completions is the student's own, sampled before the update (`mix_completions`): λ = 0 is supervised
distillation, λ = 1 on-policy distillation. There is no gradient through the sampling.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.algorithms.common.distillation import distillation_objective
from rljax.ops.distillation import EstimatorFn, full_vocabulary
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import CompareFn, Objective, Trajectory, WeightsFn


def gkd(
    compare: CompareFn,
    beta: float = 0.5,
    estimator: EstimatorFn = full_vocabulary,
    weights: WeightsFn = seq_mean_token_mean,
) -> Objective:
    """GKD over `Distillation`.

    Args:
      estimator: β -> divergence, of `ops.distillation`: over the vocabulary, over the k likeliest tokens
        (`partial(top_k, k=64)`), or of the sampled token (β = 1, on the student's own completions).
    """
    return distillation_objective(compare, estimator(beta), weights)


def mix_completions(
    key: Array, sampled: Trajectory, dataset: Trajectory, student_fraction: float | Array
) -> Trajectory:
    """Each row the student's completion with probability λ = `student_fraction`, else the data set's.

    Row i of both continues the same prompt. Raises ValueError where the two trajectories differ in shape.
    """
    if sampled.mask.shape != dataset.mask.shape:
        shapes = f"{sampled.mask.shape} and {dataset.mask.shape}"
        raise ValueError(f"rows are mixed of trajectories of one shape, not of {shapes}: pad the shorter one")
    own = jax.random.bernoulli(key, student_fraction, sampled.mask.shape[:1])

    def choose(x, y):
        return jnp.where(jnp.expand_dims(own, range(1, x.ndim)), x, y)

    return jax.tree.map(choose, sampled, dataset)
