"""The metrics of a run: of a rollout, of its credit and of the updates made from it. docs/metrics.md explains each.

Functions of arrays; the quantities behind some of them are in `train.diagnostics`. A mean over nothing is NaN.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops import groups
from rljax.ops.kl import k1, k3
from rljax.ops.ratios import importance_ratio
from rljax.ops.returns import correct_episodes, episode_rewards
from rljax.ops.statistics import (
    explained_variance,
    masked_max,
    masked_mean,
    masked_min,
    masked_std,
    nan_where_none,
)
from rljax.train.diagnostics import sampler_mismatch, sequence_kl
from rljax.types import Array, Batch, PolicyOutput, Trajectory

MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")  # of every update, or the run stops

# --------------------------------------------------------------------------------------------------------- a rollout


@partial(jax.jit, static_argnames="names")
def rollout_metrics(traj: Trajectory, names: tuple[str, ...], above: float = 0.0) -> dict[str, Array]:
    """Scalars of a scored rollout: rewards in total and by verifier, lengths, and how many groups carry a signal.

    Args:
      names: of the verifiers, as in `scores`. above: the first score of a correct completion is (`correct_episodes`).
    """
    total, valid = episode_rewards(traj.rewards, traj.mask)
    length = traj.mask.sum(axis=1)
    solved, _ = correct_episodes(traj.rewards, traj.mask, traj.scores, above)
    correct = groups.group_sum(solved.astype(float), traj.group)
    count = groups.group_count(traj.group, valid)
    compared = count > 1
    equal = groups.zero_std(total, traj.group, valid).astype(float)
    metrics = {
        "reward": _over(masked_mean, total, valid),
        "reward_std": _over(_population_std, total, valid),
        "reward_max": _over(masked_max, total, valid),
        "reward_min": _over(masked_min, total, valid),
        "frac_reward_failed": _fraction(~valid),
        "frac_reward_zero_std": _over(masked_mean, equal, compared),
        "solved_all": _fraction((count > 0) & (correct == count)),
        "solved_none": _fraction((count > 0) & (correct == 0)),
        "length": length.astype(float).mean(),
        "length_max": length.max(),
        "length_min": length.min(),
        "frac_empty": _fraction(length == 0),
        "tokens": length.sum(),
    }
    if traj.truncated is not None:
        metrics["truncated"] = _fraction((traj.truncated & traj.mask).any(axis=1))
    if traj.version is not None:
        newest = jnp.where(traj.mask, traj.version, -1).max()
        metrics["version_lag"] = _over(masked_mean, (newest - traj.version).astype(float), traj.mask)
    if traj.ref_logp is not None:
        metrics["kl_sequence"] = sequence_kl(traj).mean()
    if traj.old_logp is not None:
        mismatch = sampler_mismatch(traj.old_logp, traj.logp, traj.mask)
        metrics |= {f"sampler_{name}": value for name, value in mismatch.items()}
    for k, name in enumerate(names):
        score = traj.scores[:, k]
        scored = jnp.isfinite(score)
        metrics[f"reward/{name}"] = _over(masked_mean, score, scored)
        metrics[f"reward/{name}_std"] = _over(_population_std, score, scored)
    return metrics


def reward_and_kl(traj: Trajectory) -> dict[str, float]:
    """Mean reward of the scored rows with its standard error, and the KL to the reference in nats per sequence.

    The error is that of independent prompts, not completions. NaN of one prompt.
    """
    total, valid = episode_rewards(jnp.asarray(traj.rewards), traj.mask)
    error = groups.standard_error(jnp.where(valid, total, 0.0), valid, traj.group)
    return {
        "reward": float(_over(masked_mean, total, valid)),
        "error": float(error),
        "kl": float(sequence_kl(traj).mean()),
    }


def _fraction(x: Array) -> Array:
    return x.astype(float).mean()


def _over(statistic: Callable[[Array, Array], Array], x: Array, mask: Array) -> Array:
    """The statistic of the unmasked entries; NaN where there is none."""
    return nan_where_none(statistic(x, mask), mask.sum())


def _population_std(x: Array, mask: Array) -> Array:
    """Standard deviation with ddof 0."""
    return jnp.sqrt(masked_mean((x - masked_mean(x, mask)) ** 2, mask))


# ------------------------------------------------------------------------------------------------------------ credit


@jax.jit
def credit_metrics(batch: Batch) -> dict[str, Array]:
    """Scalars of a credited rollout: advantages and, with a critic, values, returns and explained variance."""
    mask = batch.mask
    shown = {"advantage": batch.advantages}
    if batch.returns is not None:
        shown["return"] = batch.returns
    values = None if batch.traj.values is None else batch.traj.values[:, :-1]
    if values is not None:
        shown["value"] = values
    metrics = {}
    for name, x in shown.items():
        metrics[name] = _over(masked_mean, x, mask)
        metrics[f"{name}_std"] = _over(masked_std, x, mask)
        metrics[f"{name}_max"] = _over(masked_max, x, mask)
        metrics[f"{name}_min"] = _over(masked_min, x, mask)
    if values is not None and batch.returns is not None:
        explained = explained_variance(values, batch.returns, mask)
        metrics["explained_variance"] = nan_where_none(explained, mask.sum())
    return metrics


# ----------------------------------------------------------------------------------------------------------- updates


def policy_metrics(output: PolicyOutput, batch: Batch) -> dict[str, Array]:
    """How far the policy is from the behavior policy, and its entropy: {name: [B T]}, to be averaged over the mask.

    Of *_max and *_min the extremum is taken. `average_metrics` turns `ratio_squared` into the spread of the ratios: a
    sum over micro-batches cannot carry a spread.
    """
    behavior_logp = batch.traj.logp
    old_logp = batch.traj.old_logp
    ratio = importance_ratio(output.logp, behavior_logp)
    metrics = {
        "ratio": ratio,
        "ratio_max": ratio,
        "ratio_min": ratio,
        "ratio_squared": ratio**2,
        "logp_diff_max": jnp.abs(output.logp - behavior_logp),  # at a rollout's first update: sampler against trainer
        "kl_behavior": k3(behavior_logp, output.logp),
        "kl_behavior_k1": k1(behavior_logp, output.logp),
    }
    if old_logp is not None:
        metrics["kl_old"] = k3(old_logp, output.logp)
    if output.entropy is not None:
        metrics["entropy"] = output.entropy
    return metrics


def average_metrics(updates: Iterable[dict]) -> dict[str, float]:
    """The metrics of one rollout from those of its updates: means, of *_max and *_min the extremum.

    An update in which a metric is NaN, since nothing was measured, does not count in its mean.
    """
    updates = jax.device_get(list(updates))  # every copy begins before the first is waited for
    average = {}
    for name in updates[0]:
        values = [float(metrics[name]) for metrics in updates]
        if name.endswith("_max"):
            average[name] = float(np.max(values))
        elif name.endswith("_min"):
            average[name] = float(np.min(values))
        else:
            counted = values if name in MUST_BE_FINITE else [value for value in values if not math.isnan(value)]
            average[name] = sum(counted) / len(counted) if counted else math.nan
    return _with_ratio_spread(average)


def _with_ratio_spread(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with `ratio_std` and `ess_fraction` in place of `ratio_squared`, NaN where that is.

    E ρ² - (E ρ)² is taken of float32 means: a spread below about 3e-4 is rounding.
    """
    if "ratio_squared" not in metrics:
        return metrics
    out = {name: value for name, value in metrics.items() if name != "ratio_squared"}
    mean = metrics["ratio"]
    square = metrics["ratio_squared"]
    if math.isnan(square):
        return out | {"ratio_std": math.nan, "ess_fraction": math.nan}
    out["ratio_std"] = math.sqrt(square - mean**2) if square > mean**2 else 0.0
    out["ess_fraction"] = min(mean**2 / square, 1.0) if square > 0 else 0.0
    return out


def require_on_policy(metrics: dict, limit: float = 1e-3) -> None:
    """Check that the trainer's log-probs are the sampler's at the first update of a run, and that it clips nothing.

    Raises RuntimeError where they differ by more than `limit` nats: sampler and trainer then disagree on the model, the
    temperature or the tokens, and every importance ratio would be wrong. Raises it too where any decision was clipped:
    a difference within the limit was more than the method's clip range.
    """
    gap = float(metrics["sampler_gap"])
    if not gap <= limit:
        raise RuntimeError(
            f"sampler and trainer log-probs differ by up to {gap:.2g} nats at the first update (limit {limit:g})"
        )
    clipped = float(metrics.get("clip_fraction_first", 0.0))
    if clipped > 0:
        raise RuntimeError(
            f"the first update clipped {clipped:.2%} of the decisions of its own policy: sampler and trainer log-probs "
            f"differ by up to {gap:.2g} nats, more than the clip range of this method. Annotate old_logp"
        )
