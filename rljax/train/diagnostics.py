"""Quantities behind the metrics: KL to the reference, sampler-trainer mismatch, pass@k, majority votes.

Pure functions of arrays. `train.metrics` logs some of them for every rollout; all are explained in docs/metrics.md.
"""

import jax
import jax.numpy as jnp

from rljax.ops import groups
from rljax.ops.kl import k1, k3
from rljax.ops.pass_at_k import pass_at_k
from rljax.ops.ratios import importance_ratio
from rljax.ops.statistics import masked_max, masked_mean, masked_min, nan_where_none
from rljax.types import Array, Trajectory


def sequence_kl(traj: Trajectory) -> Array:
    """[B] Σ_t log π_behavior - log π_ref of each row, in nats; its mean estimates the KL per sequence."""
    return jnp.where(traj.mask, k1(traj.logp, traj.ref_logp), 0.0).sum(axis=1)


def sampler_mismatch(logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """How far the trainer's log-probs [B T] of the sampled tokens are from the sampler's own, ρ = π_train/π_sampler.

    `kl`, `kl_k3`: KL(sampler ‖ trainer) per token, by k1 and k3. `chi2` = mean ρ² - 1, the variance of the importance
    weights where their mean is 1; `chi2_sequence` the same of the products over completions. Perplexities are
    exp(-mean log-prob) of a completion, averaged over completions that have a token; the gap is the log of the
    trainer's over the sampler's. All are NaN without a token.
    """
    logp = jnp.where(mask, logp, 0.0)
    sampler_logp = jnp.where(mask, sampler_logp, 0.0)
    rows = mask.any(axis=1)
    count = jnp.maximum(mask.sum(axis=1), 1)
    mean = logp.sum(axis=1) / count
    sampler_mean = sampler_logp.sum(axis=1) / count
    gap = sampler_mean - mean
    product = importance_ratio(logp.sum(axis=1), sampler_logp.sum(axis=1))
    found = {
        "kl": masked_mean(k1(sampler_logp, logp), mask),
        "kl_k3": masked_mean(k3(sampler_logp, logp), mask),
        "chi2": masked_mean(importance_ratio(logp, sampler_logp) ** 2, mask) - 1.0,
        "chi2_sequence": masked_mean(product**2, rows) - 1.0,
        "perplexity": masked_mean(jnp.exp(-sampler_mean), rows),
        "perplexity_of_trainer": masked_mean(jnp.exp(-mean), rows),
        "perplexity_ratio": masked_mean(jnp.exp(gap), rows),
        "log_perplexity": masked_mean(-sampler_mean, rows),
        "log_perplexity_of_trainer": masked_mean(-mean, rows),
        "log_perplexity_gap": masked_mean(gap, rows),
        "log_perplexity_gap_size": masked_mean(jnp.abs(gap), rows),
        "log_perplexity_gap_max": masked_max(gap, rows),
        "log_perplexity_gap_min": masked_min(gap, rows),
    }
    return {name: nan_where_none(value, mask.sum()) for name, value in found.items()}


def solve_rates(
    correct: Array, group: Array, valid: Array, ks: tuple[int, ...] = (1,), answers: Array | None = None
) -> dict[str, Array]:
    """`avg@k`, `pass@k` and, where `answers` are given, `maj@k`: means over prompts.

    avg@k is the fraction of correct ones among the first k scored completions of a prompt; maj@k the probability that
    the most common answer of these is correct, ties broken uniformly; pass@k is estimated from all of them. Prompts
    without a scored completion are left out, of pass@k those with fewer than k; NaN where all are.

    Args:
      correct, valid: [B] bool: the completion is correct; it was scored.
      answers: [B] the final answer that each completion gives, equal answers as equal numbers.
    """
    position = _position_in_group(group, valid)
    count = groups.group_count(group, valid)
    solved = groups.group_sum((correct & valid).astype(float), group)
    rates = {}
    for k in ks:
        first = valid & (position < k)
        average = groups.group_mean(correct.astype(float), group, first)
        rates[f"avg@{k}"] = _mean_over_groups(average, group, valid)
        rates[f"pass@{k}"] = _mean_over_groups(pass_at_k(count, solved, k), group, valid & (count >= k))
        if answers is not None:
            majority = majority_correct(answers, correct, group, first)
            rates[f"maj@{k}"] = _mean_over_groups(majority, group, valid)
    return rates


def majority_correct(answers: Array, correct: Array, group: Array, valid: Array) -> Array:
    """[B] the probability that the most common answer among a group's valid rows is correct, ties broken uniformly."""
    _, same = jnp.unique(jnp.stack([group, answers]), axis=1, return_inverse=True, size=group.shape[0])
    votes = jnp.where(valid, groups.group_count(same, valid), 0.0)
    _, ids = jnp.unique(group, return_inverse=True, size=group.shape[0])
    most = jax.ops.segment_max(votes, ids, num_segments=group.shape[0])[ids]
    return groups.group_mean(correct.astype(float), group, valid & (votes == most))


def _mean_over_groups(x: Array, group: Array, valid: Array) -> Array:
    """Mean over groups of x, which is the same on all rows of a group; groups without a valid row are left out."""
    weight = jnp.where(valid, 1.0 / jnp.maximum(groups.group_count(group, valid), 1.0), 0.0)
    mean = jnp.where(valid, weight * x, 0.0).sum() / jnp.maximum(weight.sum(), 1.0)
    return nan_where_none(mean, valid.sum())


def _position_in_group(group: Array, valid: Array) -> Array:
    """[B] how many valid rows of the same group come before each row."""
    order = jnp.argsort(group, stable=True)
    counted = valid[order].astype(jnp.int32)
    before = jnp.cumsum(counted) - counted
    _, ids = jnp.unique(group[order], return_inverse=True, size=group.shape[0])
    start = jax.ops.segment_min(before, ids, num_segments=group.shape[0])[ids]
    return jnp.zeros_like(before).at[order].set(before - start)
