"""KTO: Kahneman-Tversky optimisation of answers judged one by one (arXiv:2402.01306, eq. 8).

    L = (1/N) Σ_i λ_i [1 - σ(±β(Δ_i - z))]        + where desirable, - where not; λ_D or λ_U
    z = max(0, mean over the batch of log π/π_ref of prompts with other prompts' answers)

z estimates the KL to the reference; it and the λ come from the whole optimizer batch and carry no gradient.
`mismatched` holds those wrong pairs, annotated with `ref_logp` too: each prompt followed by the *next* row's answer,
made before the tokens become a Trajectory (rolling whole rows would give right pairs back): it takes two prompts.
Without it z = 0: APO-zero for unpaired answers (arXiv:2408.06266).
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.algorithms.common.pairs import has_tokens, log_coefficients, unpaired_objective
from rljax.ops import preferences
from rljax.ops.statistics import masked_mean
from rljax.types import Objective


def uniform_class_weights(good, bad):
    """λ_D = λ_U = 1."""
    return 1.0, 1.0


def fixed_class_weights(desirable: float, undesirable: float) -> Callable:
    """λ_D and λ_U as given."""
    return lambda good, bad: (desirable, undesirable)


def balanced_class_weights(ratio: float = 1.0) -> Callable:
    """λ_U = 1 and λ_D such that λ_D n_D = ratio · λ_U n_U. The paper advises ratios from 1 to 4/3."""

    def weights(good, bad):
        return jnp.where(good.any() & bad.any(), ratio * bad.sum() / jnp.maximum(good.sum(), 1), 1.0), 1.0

    return weights


def kto(policy: Callable, beta: float = 0.1, class_weights: Callable = uniform_class_weights) -> Objective:
    """An objective over `Unpaired`. `class_weights`: (good [B], bad [B]) -> (λ_D, λ_U)."""

    def before(look, batch, present):
        z = jnp.zeros(())
        if batch.mismatched is not None:
            z = jnp.maximum(masked_mean(look(batch.mismatched).log_ratio, has_tokens(batch.mismatched)), 0.0)
        good, bad = class_weights(present & batch.desirable, present & ~batch.desirable)
        weight = batch.weight * jnp.where(batch.desirable, good, bad)
        return batch.replace(weight=weight, coefficients=batch.coefficients | {"kl": z})

    def term(ratio, batch):
        return preferences.kto_loss(ratio, batch.desirable, batch.coefficients["kl"], beta)

    return log_coefficients(unpaired_objective(policy, term, before, beta), "kl")
