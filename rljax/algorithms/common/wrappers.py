"""Algorithm -> Algorithm: terms that any method can carry.

A coefficient given here is the value used unless the training state carries one of that name (`coefficients["kl"]`):
then the state's holds, a traced scalar that a controller may change without recompiling.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.algorithms.common.credit import old_logp, outcome_rewards, require
from rljax.ops.kl import importance_weighted_k3, k1, k3
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Scalar


def with_needs(algorithm: Algorithm, *fields: str, **changes) -> Algorithm:
    """The algorithm with further needs, which its credit then checks, and other changes."""
    algorithm = algorithm._replace(needs=tuple(dict.fromkeys((*algorithm.needs, *fields))), **changes)

    def credit(traj, coefficients):
        require(traj, *fields)
        return algorithm.credit(traj, coefficients)

    return algorithm._replace(credit=credit) if fields else algorithm


def with_prepare(algorithm: Algorithm, find: Callable) -> Algorithm:
    """The algorithm whose `prepare` goes on to put find(output, batch), a dict of [B T], into `batch.extra`."""

    def prepare(output, batch, key):
        if algorithm.prepare is not None:
            batch = algorithm.prepare(output, batch, key)
        return batch.replace(extra={**batch.extra, **find(output, batch)})

    return algorithm._replace(prepare=prepare)


def _add(algorithm: Algorithm, name: str, coefficient: Scalar, term: Callable, *needs: str) -> Algorithm:
    """L_t + coefficient · term(output, batch), where term also gives the value to log under `name`."""

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        extra, shown = term(output, batch)
        scale = batch.coefficients.get(name, coefficient)
        return terms + scale * extra, {**metrics, name: shown}

    return with_needs(algorithm, *needs, loss=loss)


def with_kl(
    algorithm: Algorithm, coefficient: float = 0.04, estimator: Callable = k3, allow_k1: bool = False
) -> Algorithm:
    """L_t + β KL(π ‖ π_ref), estimated at the drawn token by one of `ops.kl` (whose docstring says what each one's
    gradient is). The default is GRPO's k3 (arXiv:2402.03300).

    Raises ValueError for k1, whose gradient in a loss is zero on average, unless `allow_k1`: it belongs in the reward
    (`kl_in_reward`).
    """
    if estimator is k1 and not allow_k1:
        raise ValueError("k1 in a loss has no gradient on average; take k3_with_k2_gradient, k2 or k3, or kl_in_reward")

    def term(output, batch):
        value = estimator(output.logp, batch.traj.ref_logp)
        return value, value

    return _add(algorithm, "kl", coefficient, term, "ref_logp")


def with_importance_weighted_kl(algorithm: Algorithm, coefficient: float = 0.04) -> Algorithm:
    """L_t + β (π/π_old) k3 with the ratio differentiated: the KL term whose value and gradient stay right off-policy
    (DeepSeek-V3.2, arXiv:2512.02556).
    """

    def term(output, batch):
        value = importance_weighted_k3(output.logp, batch.traj.ref_logp, old_logp(batch.traj))
        return value, value

    return _add(algorithm, "kl", coefficient, term, "ref_logp")


def with_entropy(algorithm: Algorithm, coefficient: Scalar = 0.01) -> Algorithm:
    """L_t - c H(π(· | s_t)): an entropy bonus, in nats a decision. `controllers.adaptive_entropy` moves c."""

    def term(output, batch):
        return -output.entropy, output.entropy

    return _add(algorithm, "entropy", coefficient, term)


def with_positive_nll(algorithm: Algorithm, coefficient: float = 0.1, above: float = 0.0) -> Algorithm:
    """Adds -c (1/Σ_good n) Σ_good log π over the answers whose reward is above `above` (VAPO, arXiv:2504.05118).

    Put it outside of `kl_in_reward` and `overlong_penalty`: it judges by the rewards it is given.
    """

    def credit(traj, coefficients):
        batch, (rewards, _) = algorithm.credit(traj, coefficients), outcome_rewards(traj)
        good = jnp.broadcast_to((rewards > above)[:, None], batch.mask.shape)
        return batch.replace(extra={**batch.extra, "good": good})

    def find(_, batch):
        share = token_mean(batch.mask & batch.extra["good"])
        return {
            "positive_nll": jnp.where(batch.weight > 0, share / jnp.where(batch.weight > 0, batch.weight, 1.0), 0.0)
        }

    def term(output, batch):
        value = -batch.extra["positive_nll"] * output.logp
        return value, value

    return _add(with_prepare(algorithm._replace(credit=credit), find), "positive_nll", coefficient, term)
