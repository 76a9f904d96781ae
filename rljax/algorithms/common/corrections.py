"""Algorithm -> Algorithm: where the sampler, the trainer's old policy and the policy being trained are not the same.

`traj.logp` is what the sampler reported, `traj.old_logp` what the trainer computes before the update. Stale samples,
quantised weights or merely other kernels part the two. A correction multiplies the advantages by a constant weight made
of π_old/π_sampler. In a loss proportional to Â that weighs the policy's terms; terms of a critic, of the KL and of the
entropy stay as they are, in whatever order the wrappers stand. Three limits: `a_star_po` is a regression onto Â and
`real` reads its sign only, so that neither can be corrected so; and where one ratio speaks for a whole answer (rloo,
gspo, gmpo) a weight of a single token scales that token's term, not its share in the ratio (`gspo_token` has no such
tie).

Where no `old_logp` is annotated the ratio of a loss is to the sampler already, and a correction on top would count
twice: hence each asks for it. A token that a weight takes out still counts in the divisor; only `reject` takes it out
of the batch. Truncated and sequence weights: Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"; the bounds on tokens are called IcePop.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.wrappers import with_needs, with_prepare
from rljax.ops import ratios
from rljax.ops.kl import k3
from rljax.ops.sequences import sequence_mean
from rljax.types import Algorithm, Batch


def _weigh(algorithm: Algorithm, weight: Callable, name: str, *needs: str) -> Algorithm:
    """The algorithm on advantages times weight(output, batch), a constant; its metrics are those without the weight.

    Its loss is traced twice for that; the compiler drops the unweighted terms.
    """

    def loss(output, batch):
        factor = stop_gradient(weight(output, batch))
        _, metrics = algorithm.loss(output, batch)
        terms, _ = algorithm.loss(output, batch.replace(advantages=factor * batch.advantages))
        return terms, {**metrics, name: factor}

    return with_needs(algorithm, *needs, loss=loss)


def sampler_ratio(batch: Batch, level: Callable = ratios.token_level):
    """π_old/π_sampler on each decision, by a level of `ops.ratios`. [B T]"""
    log_ratio = batch.traj.old_logp - batch.traj.logp
    return jnp.where(batch.mask, ratios.bounded_exp(level(log_ratio, batch.mask, batch.traj.segments)), 0.0)


def truncate_is(algorithm: Algorithm, cap: float = 2.0, level: Callable = ratios.token_level) -> Algorithm:
    """TIS: Â times min(π_old/π_sampler, cap)."""
    return _weigh(
        algorithm, lambda _, b: ratios.truncate_weights(sampler_ratio(b, level), cap), "sampler_weight", "old_logp"
    )


def mask_is(
    algorithm: Algorithm, low: float = 0.5, high: float = 5.0, level: Callable = ratios.token_level
) -> Algorithm:
    """MIS: Â times π_old/π_sampler where that is inside [low, high], 0 outside. By token it is IcePop."""
    return _weigh(
        algorithm, lambda _, b: ratios.mask_weights(sampler_ratio(b, level), low, high), "sampler_weight", "old_logp"
    )


def normalized_is(
    algorithm: Algorithm, mean: Callable, cap: float = 2.0, level: Callable = ratios.token_level
) -> Algorithm:
    """TIS divided by its mean over the optimizer batch, itself taken by one of `ops.weights`."""

    def find(_, batch):
        weight = ratios.truncate_weights(sampler_ratio(batch, level), cap)
        return {"sampler_weight": ratios.normalize_weights(weight, mean(batch.mask, batch.traj.segments))}

    weighed = _weigh(algorithm, lambda _, b: b.extra["sampler_weight"], "sampler_weight", "old_logp")
    return with_prepare(weighed, find)


def reject(
    algorithm: Algorithm,
    low: float = float("-inf"),
    high: float = float("inf"),
    divergence: Callable = k3,
    level: Callable = sequence_mean,
) -> Algorithm:
    """Takes decisions out of the batch (and its divisors) unless low <= level(divergence) <= high.

    divergence(sampler's log-prob, old log-prob): an estimator of KL(sampler ‖ old) in `ops.kl`; level: `token_level`,
    or a sum, mean or maximum of `ops.sequences`. k1's bounds are on log π_sampler - log π_old.
    """

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, coefficients)
        return batch.replace(mask=batch.mask & kept(batch, low, high, divergence, level))

    return with_needs(algorithm, "old_logp", credit=credit)


def kept(batch: Batch, low: float, high: float, divergence: Callable, level: Callable):
    """Which decisions `reject` keeps. bool [B T]"""
    sampler, old = (jnp.where(batch.mask, x, 0.0) for x in (batch.traj.logp, batch.traj.old_logp))
    measured = level(divergence(sampler, old), batch.mask, batch.traj.segments)
    return (measured >= low) & (measured <= high)


def off_policy_sequence_mask(algorithm: Algorithm, limit: float = 0.1) -> Algorithm:
    """No gradient from answers with Â < 0 that the policy has moved away from: mean_t(log π_sampler - log π) > limit
    (off-policy sequence mask, DeepSeek-V3.2, arXiv:2512.02556).
    """

    def weight(output, batch):
        mean = lambda x: sequence_mean(x, batch.mask, batch.traj.segments)  # noqa: E731
        stale = mean(batch.traj.logp - output.logp) > limit
        return 1.0 - (stale & (mean(batch.advantages) < 0)).astype(output.logp.dtype)

    return _weigh(algorithm, weight, "off_policy_kept")


def high_entropy_mask(algorithm: Algorithm, share: float = 0.2) -> Algorithm:
    """Only the `share` of decisions with the highest entropy, over the optimizer batch, keep their gradient (80/20,
    arXiv:2506.01939).
    """

    def find(output, batch):
        limit = jnp.nanquantile(jnp.where(batch.mask, output.entropy, jnp.nan), 1.0 - share)
        return {"high_entropy_kept": output.entropy >= limit}

    weighed = _weigh(algorithm, lambda o, b: b.extra["high_entropy_kept"].astype(o.logp.dtype), "high_entropy_kept")
    return with_prepare(weighed, find)
