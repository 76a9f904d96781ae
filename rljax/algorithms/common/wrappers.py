"""Algorithm -> Algorithm: terms that can be added to any loss.

A coefficient given here is used unless the training state has one of that name (`coefficients["kl"]`): then that one
is used, a traced scalar that a controller may change without recompiling.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rljax.algorithms.common.credit import correct_rows, old_policy_logp, require
from rljax.ops.kl import KLEstimator, importance_weighted_k3, k1, k3
from rljax.ops.shapes import PerToken, Scalar
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch, PolicyOutput

TermFn = Callable[[PolicyOutput, Batch], tuple[PerToken, PerToken]]  # (output, batch) -> term, value to log
ExtraFn = Callable[[PolicyOutput, Batch], dict[str, PerToken]]  # (output, batch) -> entries of `Batch.extra`


def with_needs(algorithm: Algorithm, *fields: str, **changes: Any) -> Algorithm:
    """The algorithm with further fields that it needs, which its credit then checks, and with other changes."""
    algorithm = algorithm._replace(needs=tuple(dict.fromkeys((*algorithm.needs, *fields))), **changes)

    def credit(traj, coefficients):
        require(traj, *fields)
        return algorithm.credit(traj, coefficients)

    return algorithm._replace(credit=credit) if fields else algorithm


def with_prepare(algorithm: Algorithm, compute: ExtraFn) -> Algorithm:
    """The algorithm whose `prepare` also puts compute(output, batch) into `batch.extra`."""

    def prepare(output, batch, key):
        if algorithm.prepare is not None:
            batch = algorithm.prepare(output, batch, key)
        return batch.replace(extra={**batch.extra, **compute(output, batch)})

    return algorithm._replace(prepare=prepare)


def _with_term(algorithm: Algorithm, name: str, coefficient: Scalar, term: TermFn, *needs: str) -> Algorithm:
    """L_t + coefficient · term(output, batch); the value to log is logged under `name`."""

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        extra, shown = term(output, batch)
        scale = batch.coefficients.get(name, coefficient)
        return terms + scale * extra, {**metrics, name: shown}

    return with_needs(algorithm, *needs, loss=loss)


def with_kl(
    algorithm: Algorithm, coefficient: float = 0.04, estimator: KLEstimator = k3, allow_k1: bool = False
) -> Algorithm:
    """L_t + β KL(π ‖ π_ref), estimated at the sampled token by one of `ops.kl` (whose docstring gives the gradient of
    each). The default is GRPO's k3 (arXiv:2402.03300).

    Raises ValueError for k1, whose gradient in a loss is zero on average, unless `allow_k1`: it belongs in the reward
    (`kl_in_reward`).
    """
    if estimator is k1 and not allow_k1:
        raise ValueError("k1 in a loss has no gradient on average; take k3_with_k2_gradient, k2 or k3, or kl_in_reward")

    def term(output, batch):
        value = estimator(output.logp, batch.traj.ref_logp)
        return value, value

    return _with_term(algorithm, "kl", coefficient, term, "ref_logp")


def with_importance_weighted_kl(algorithm: Algorithm, coefficient: float = 0.04) -> Algorithm:
    """L_t + β (π/π_old) k3 with the ratio differentiated: the KL term whose value and gradient are also right
    off-policy (DeepSeek-V3.2, arXiv:2512.02556).
    """

    def term(output, batch):
        value = importance_weighted_k3(output.logp, batch.traj.ref_logp, old_policy_logp(batch.traj))
        return value, value

    return _with_term(algorithm, "kl", coefficient, term, "ref_logp")


def with_entropy(algorithm: Algorithm, coefficient: Scalar = 0.01) -> Algorithm:
    """L_t - c H(π(· | s_t)): an entropy bonus, in nats per decision. `controllers.adaptive_entropy` changes c."""

    def term(output, batch):
        return -output.entropy, output.entropy

    return _with_term(algorithm, "entropy", coefficient, term)


def with_positive_nll(algorithm: Algorithm, coefficient: float = 0.1, above: float = 0.0) -> Algorithm:
    """Adds -c (1/Σ_pos n) Σ_pos log π over the correct completions, whose first score is above `above` (`correct_rows`;
    VAPO, arXiv:2504.05118).

    Without scores it compares the rewards that it is given: apply it after `kl_in_reward` and `overlong_penalty` then.
    """

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, coefficients)
        correct, _ = correct_rows(traj, above)
        positive = jnp.broadcast_to(correct[:, None], batch.mask.shape)
        return batch.replace(extra={**batch.extra, "positive": positive})

    def rescaled_mean(_, batch):
        """Weights of the token mean over positive completions, divided by the weights of the loss."""
        weight = token_mean(batch.mask & batch.extra["positive"])
        scale = jnp.where(batch.weight > 0, weight / jnp.where(batch.weight > 0, batch.weight, 1.0), 0.0)
        return {"positive_nll": scale}

    def term(output, batch):
        value = -batch.extra["positive_nll"] * output.logp
        return value, value

    prepared = with_prepare(algorithm._replace(credit=credit), rescaled_mean)
    return _with_term(prepared, "positive_nll", coefficient, term)
