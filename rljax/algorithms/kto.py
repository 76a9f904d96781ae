"""KTO: Kahneman-Tversky optimization of unpaired completions (arXiv:2402.01306, eq. 8).

    L = (1/N) Σ_i λ_i [1 - σ(±β(Δ_i - z))]        + where desirable, - where not; λ_D or λ_U
    z = max(0, mean over the batch of log π/π_ref of prompts with other prompts' completions)

z estimates the KL to the reference; it and the λ come from the whole optimizer batch and carry no gradient.
`mismatched` holds those mismatched completions, annotated with `ref_logp` too: each prompt followed by the *next* row's
completion, built before the tokens become a Trajectory (rolling whole rows would give matching pairs back): it takes
two prompts. Without it z = 0: APO-zero for unpaired completions (arXiv:2408.06266).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algorithms.common.pairs import has_tokens, log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.ops.shapes import Scalar
from rljax.ops.statistics import masked_mean
from rljax.types import Objective, PolicyFn

# (desirable [B], undesirable [B]) -> (λ_D, λ_U)
ClassWeightsFn = Callable[[Bool[Array, " B"], Bool[Array, " B"]], tuple[Scalar, Scalar]]


def uniform_class_weights(desirable: Bool[Array, " B"], undesirable: Bool[Array, " B"]) -> tuple[float, float]:
    """λ_D = λ_U = 1."""
    return 1.0, 1.0


def fixed_class_weights(lambda_desirable: float, lambda_undesirable: float) -> ClassWeightsFn:
    """λ_D and λ_U as given."""

    def class_weights(desirable, undesirable):
        return lambda_desirable, lambda_undesirable

    return class_weights


def balanced_class_weights(ratio: float = 1.0) -> ClassWeightsFn:
    """λ_U = 1 and λ_D such that λ_D n_D = ratio · λ_U n_U. The paper advises ratios from 1 to 4/3."""

    def class_weights(desirable, undesirable) -> tuple[Float[Array, ""], float]:
        balance = ratio * undesirable.sum() / jnp.maximum(desirable.sum(), 1)
        return jnp.where(desirable.any() & undesirable.any(), balance, 1.0), 1.0

    return class_weights


def kto(policy: PolicyFn, beta: float = 0.1, class_weights: ClassWeightsFn = uniform_class_weights) -> Objective:
    """An objective over `Unpaired`. `class_weights`: (desirable [B], undesirable [B]) -> (λ_D, λ_U)."""

    def set_reference_point(evaluate, batch, present):
        z = jnp.zeros(())
        if batch.mismatched is not None:
            rows = batch.traj.mask.shape[0]
            if batch.mismatched.mask.shape[0] != rows:
                raise ValueError(
                    f"{batch.mismatched.mask.shape[0]} mismatched rows for {rows}; give one for each prompt"
                )
            mismatched = evaluate(batch.mismatched)
            z = jnp.maximum(masked_mean(mismatched.log_ratio, has_tokens(batch.mismatched)), 0.0)
        lambda_desirable, lambda_undesirable = class_weights(present & batch.desirable, present & ~batch.desirable)
        weight = batch.weight * jnp.where(batch.desirable, lambda_desirable, lambda_undesirable)
        return batch.replace(weight=weight, coefficients=batch.coefficients | {"kl_mismatched": z})

    def term(log_ratio, batch):
        return preferences.kto_loss(log_ratio, batch.desirable, batch.coefficients["kl_mismatched"], beta)

    return log_coefficients(unpaired_objective(policy, term, set_reference_point, beta), "kl_mismatched")
