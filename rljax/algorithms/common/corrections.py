"""Algorithm -> Algorithm: corrections where sampler, old policy and the policy being trained are not the same.

`traj.logp` is what the sampler reported, `traj.old_logp` what the trainer computes before the update. Stale samples,
quantized weights or different kernels make the two differ. A correction multiplies the advantages by a constant weight
computed from π_old/π_sampler. In a loss proportional to Â that weights the policy's terms; terms of a critic, of the KL
and of the entropy stay as they are, in any order of the wrappers. Where one ratio is that of a whole completion (rloo,
gspo, luspo, gmpo) the weight of a single token scales that token's term, not its part of the ratio (`gspo_token` does
not have this limit).

Where no `old_logp` is annotated the ratio of a loss is to the sampler already, and a correction on top would count
twice: therefore each needs it. A method that corrects for the sampler itself, one that has a weight already, and one
that no weight on Â corrects raise ValueError (`Algorithm.off_policy`). A token with weight 0 still counts in the
divisor; only `reject` takes it out of the batch. Truncated and sequence weights: Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training"; the bounds on tokens are called IcePop.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import require
from rljax.algorithms.common.wrappers import with_needs, with_prepare
from rljax.ops import ratios
from rljax.ops.kl import KLEstimator, k3
from rljax.ops.ratios import RatioLevel
from rljax.ops.sequences import sequence_mean
from rljax.ops.shapes import PerToken, TokenMask
from rljax.ops.weights import LossWeights
from rljax.types import Algorithm, Batch, PolicyOutput

AdvantageWeightFn = Callable[[PolicyOutput, Batch], PerToken]  # (output, batch) -> factor of each advantage


def _weight_advantages(algorithm: Algorithm, weight: AdvantageWeightFn, name: str, *needs: str) -> Algorithm:
    """The algorithm on advantages times weight(output, batch), a constant; its metrics are those without the weight.

    Its loss is traced twice for that; the compiler removes the unweighted terms.
    """

    def loss(output, batch):
        factor = stop_gradient(weight(output, batch))
        _, metrics = algorithm.loss(output, batch)
        terms, _ = algorithm.loss(output, batch.replace(advantages=factor * batch.advantages))
        return terms, {**metrics, name: factor}

    return with_needs(algorithm, *needs, loss=loss)


def _sampler_weight(algorithm: Algorithm, weight: AdvantageWeightFn, wrapper: str) -> Algorithm:
    """The algorithm on advantages times a weight made of π_old/π_sampler.

    Raises ValueError for a method that corrects for the sampler itself, or that no such weight corrects.
    """
    if algorithm.off_policy == "itself":
        raise ValueError(
            f"{wrapper} would correct twice: this method corrects for the sampler itself, or is right for any samples; "
            "legal: without it"
        )
    if algorithm.off_policy == "never":
        raise ValueError(
            f"{wrapper} weights advantages, which does not correct this method for another sampler; legal: samples of "
            "its own policy"
        )
    return _weight_advantages(algorithm, weight, "sampler_weight", "old_logp")._replace(off_policy="itself")


def sampler_ratio(batch: Batch, level: RatioLevel = ratios.token_level) -> PerToken:
    """π_old/π_sampler of each decision, by a level of `ops.ratios`."""
    log_ratio = batch.traj.old_logp - batch.traj.logp
    return jnp.where(batch.mask, ratios.bounded_exp(level(log_ratio, batch.mask, batch.traj.segments)), 0.0)


def truncate_is(algorithm: Algorithm, cap: float = 2.0, level: RatioLevel = ratios.token_level) -> Algorithm:
    """TIS (truncated importance sampling): Â times min(π_old/π_sampler, cap)."""

    def weight(_, batch):
        return ratios.truncate_weights(sampler_ratio(batch, level), cap)

    return _sampler_weight(algorithm, weight, "truncate_is")


def mask_is(
    algorithm: Algorithm, low: float = 0.5, high: float = 5.0, level: RatioLevel = ratios.token_level
) -> Algorithm:
    """MIS (masked importance sampling): Â times π_old/π_sampler if that is in [low, high], else times 0. By token it is
    IcePop.
    """

    def weight(_, batch):
        return ratios.mask_weights(sampler_ratio(batch, level), low, high)

    return _sampler_weight(algorithm, weight, "mask_is")


def normalized_is(
    algorithm: Algorithm, weights: LossWeights, cap: float = 2.0, level: RatioLevel = ratios.token_level
) -> Algorithm:
    """TIS divided by its mean over the optimizer batch. `weights`: those of the mean, one of `ops.weights`."""

    def normalized(_, batch):
        truncated = ratios.truncate_weights(sampler_ratio(batch, level), cap)
        of_the_mean = weights(batch.mask, batch.traj.segments, batch.traj.group)
        return {"sampler_weight": ratios.normalize_weights(truncated, of_the_mean)}

    def weight(_, batch):
        return batch.extra["sampler_weight"]

    return with_prepare(_sampler_weight(algorithm, weight, "normalized_is"), normalized)


def reject(
    algorithm: Algorithm,
    low: float = float("-inf"),
    high: float = float("inf"),
    divergence: KLEstimator = k3,
    level: RatioLevel = sequence_mean,
) -> Algorithm:
    """Takes decisions out of the batch (and its divisors) unless low <= level(divergence) <= high.

    divergence(sampler's log-prob, old log-prob): an estimator of KL(sampler ‖ old) in `ops.kl`; level: `token_level`,
    or a sum, mean or maximum of `ops.sequences`. k1's bounds are on log π_sampler - log π_old.
    """

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, coefficients)
        return batch.replace(mask=batch.mask & _accepted(batch, low, high, divergence, level))

    return with_needs(algorithm, "old_logp", credit=credit)


def _accepted(batch: Batch, low: float, high: float, divergence: KLEstimator, level: RatioLevel) -> TokenMask:
    """The decisions that `reject` keeps."""
    sampler = jnp.where(batch.mask, batch.traj.logp, 0.0)
    old = jnp.where(batch.mask, batch.traj.old_logp, 0.0)
    measured = level(divergence(sampler, old), batch.mask, batch.traj.segments)
    return (measured >= low) & (measured <= high)


def staleness_filter(algorithm: Algorithm, max_staleness: int) -> Algorithm:
    """Takes decisions out of the batch (and its divisors) that a policy more than `max_staleness` versions old made.

    The present version is coefficients["version"], which a loop of your own sets to its step before `credit`: no recipe
    does. That of each decision is `traj.version`. A completion that was sampled by several policies loses its old part
    only; `credit` has seen it all.
    Raises ValueError where either is missing: nothing could be told to be stale.
    """

    def credit(traj, coefficients):
        require(traj, "version")
        if "version" not in coefficients:
            raise ValueError('staleness_filter needs the present version in coefficients["version"]')
        batch = algorithm.credit(traj, coefficients)
        fresh = coefficients["version"] - traj.version <= max_staleness
        return batch.replace(mask=batch.mask & fresh)

    return algorithm._replace(credit=credit)


def off_policy_sequence_mask(algorithm: Algorithm, limit: float = 0.1) -> Algorithm:
    """No gradient from completions with Â < 0 that have become off-policy: mean_t(log π_sampler - log π) > limit
    (DeepSeek-V3.2, arXiv:2512.02556).
    """

    def weight(output, batch):
        mask = batch.mask
        segments = batch.traj.segments
        off_policy = sequence_mean(batch.traj.logp - output.logp, mask, segments) > limit
        negative = sequence_mean(batch.advantages, mask, segments) < 0
        return 1.0 - (off_policy & negative).astype(output.logp.dtype)

    return _weight_advantages(algorithm, weight, "off_policy_kept")


def high_entropy_mask(algorithm: Algorithm, share: float = 0.2) -> Algorithm:
    """Only the fraction `share` of decisions with the highest entropy, over the optimizer batch, keeps its gradient
    (80/20, arXiv:2506.01939).
    """

    def kept(output, batch):
        limit = jnp.nanquantile(jnp.where(batch.mask, output.entropy, jnp.nan), 1.0 - share)
        return {"high_entropy_kept": output.entropy >= limit}

    def weight(output, batch):
        return batch.extra["high_entropy_kept"].astype(output.logp.dtype)

    weighted = _weight_advantages(algorithm, weight, "high_entropy_kept")
    return with_prepare(weighted, kept)
