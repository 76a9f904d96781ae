"""Numbers worth a curve, each computed in one place and explained in docs/metrics.md.

Of an update (`policy`, unreduced, and `derived` from its means), of a rollout (`rollout`, `sampler_mismatch`), of its
credit (`credit`), and of answers to the same prompts (`pass_at_k`, `solve_rates`, `majority_correct`). Pure
functions of arrays; `train.metrics` says them of a run.
"""

import math

import jax
import jax.numpy as jnp

from rljax.ops import groups
from rljax.ops.kl import k1, k3
from rljax.ops.ratios import importance_ratio
from rljax.ops.returns import episode_rewards
from rljax.ops.statistics import explained_variance, masked_max, masked_mean, masked_min, masked_std
from rljax.types import Array, Batch, PolicyOutput, Trajectory

# ---------------------------------------------------------------------------------------------------- of an update


def policy(output: PolicyOutput, batch: Batch) -> dict[str, Array]:
    """How far the policy is from the one that sampled, and its entropy: {name: [B T]}, to be averaged over the mask.

    *_max and *_min by extremum. `ratio_squared` is there for `derived`: a sum over micro-batches can carry no spread.
    """
    behaviour, old = batch.traj.logp, batch.traj.old_logp
    ratio = importance_ratio(output.logp, behaviour)
    shown = {
        "ratio": ratio,
        "ratio_max": ratio,
        "ratio_min": ratio,
        "ratio_squared": ratio**2,
        "logp_diff_max": jnp.abs(output.logp - behaviour),  # at a rollout's first update: sampler against trainer
        "kl_behavior": k3(behaviour, output.logp),
        "kl_behavior_k1": k1(behaviour, output.logp),
    }
    if old is not None:
        shown["kl_old"] = k3(old, output.logp)
    return shown if output.entropy is None else {**shown, "entropy": output.entropy}


def derived(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with `ratio_squared` turned into what it is for: `ratio_std` and `ess_fraction`.

    E ρ² - (E ρ)² is taken of float32 means: a spread below some 3e-4 is rounding.
    """
    if "ratio_squared" not in metrics:
        return metrics
    out = {name: value for name, value in metrics.items() if name != "ratio_squared"}
    mean, square = metrics["ratio"], metrics["ratio_squared"]
    out["ratio_std"] = math.sqrt(square - mean**2) if square > mean**2 else 0.0
    out["ess_fraction"] = min(mean**2 / square, 1.0) if square > 0 else 0.0
    return out


# ---------------------------------------------------------------------------------------------------- of a rollout


def rollout(traj: Trajectory, names: tuple[str, ...], solved: float = 1.0) -> dict[str, Array]:
    """Rewards in all and by verifier (`names`, as in `scores`), lengths, what groups teach; scalars.

    An answer with a total reward of at least `solved` counts as right.
    """
    total, judged = episode_rewards(traj.rewards, traj.mask)
    length = traj.mask.sum(axis=1)
    right = groups.group_sum(((total >= solved) & judged).astype(float), traj.group)
    count = groups.group_count(traj.group, judged)
    out = {
        "reward": masked_mean(total, judged),
        "reward_std": _std(total, judged),
        "reward_max": masked_max(total, judged),
        "reward_min": masked_min(total, judged),
        "frac_reward_failed": _share(~judged),
        "no_signal": _share(groups.zero_std(total, traj.group, judged)),
        "solved_all": _share((count > 0) & (right == count)),
        "solved_none": _share((count > 0) & (right == 0)),
        "length": length.astype(float).mean(),
        "length_max": length.max(),
        "length_min": length.min(),
        "aborted": _share(length == 0),
        "tokens": length.sum(),
    }
    if traj.truncated is not None:
        out["truncated"] = _share((traj.truncated & traj.mask).any(axis=1))
    if traj.version is not None:
        newest = jnp.where(traj.mask, traj.version, -1).max()
        out["version_lag"] = masked_mean((newest - traj.version).astype(float), traj.mask)
    if traj.ref_logp is not None:
        out["kl_sequence"] = drift(traj).mean()
    if traj.old_logp is not None:
        gap = sampler_mismatch(traj.old_logp, traj.logp, traj.mask)
        out |= {f"sampler_{name}": value for name, value in gap.items()}
    for k, name in enumerate(names):
        score = traj.scores[:, k]
        known = jnp.isfinite(score)
        out[f"reward/{name}"] = masked_mean(score, known)
        out[f"reward/{name}_std"] = _std(score, known)
    return out


def _share(x: Array) -> Array:
    return x.astype(float).mean()


def _std(x: Array, mask: Array) -> Array:
    """Of these very rows (ddof 0)."""
    return jnp.sqrt(masked_mean((x - masked_mean(x, mask)) ** 2, mask))


def drift(traj: Trajectory) -> Array:
    """[B] Σ_t log π_behaviour - log π_ref of each row, nats: its mean is the KL to the reference of whole answers."""
    return jnp.where(traj.mask, k1(traj.logp, traj.ref_logp), 0.0).sum(axis=1)


def sampler_mismatch(logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """How far the trainer's log-probs [B T] of the sampled tokens are from the sampler's own, ρ = π_train/π_sampler.

    `kl`, `kl_k3`: KL(sampler ‖ trainer) a decision. `chi2` = mean ρ² - 1, what importance weights cost; `chi2_sequence`
    of the products over answers. Perplexities are exp(-mean log-prob) of an answer, averaged over answers that have a
    decision; the gap is log of the trainer's over the sampler's.
    """
    clean = lambda x: jnp.where(mask, x, 0.0)  # noqa: E731
    logp, sampler_logp = clean(logp), clean(sampler_logp)
    rows, n = mask.any(axis=1), jnp.maximum(mask.sum(axis=1), 1)
    mean, sampler_mean = logp.sum(axis=1) / n, sampler_logp.sum(axis=1) / n
    gap = sampler_mean - mean
    product = importance_ratio(logp.sum(axis=1), sampler_logp.sum(axis=1))
    return {
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


def credit(batch: Batch) -> dict[str, Array]:
    """Advantages, and with a critic its values, their targets and how much of these it explains; scalars."""
    mask = batch.mask
    shown = {"advantage": batch.advantages}
    if batch.returns is not None:
        shown["return"] = batch.returns
    values = None if batch.traj.values is None else batch.traj.values[:, :-1]
    if values is not None:
        shown["value"] = values
    reduce = {"": masked_mean, "_std": masked_std, "_max": masked_max, "_min": masked_min}
    out = {name + suffix: f(x, mask) for name, x in shown.items() for suffix, f in reduce.items()}
    if values is not None and batch.returns is not None:
        out["explained_variance"] = explained_variance(values, batch.returns, mask)
    return out


# -------------------------------------------------------------------------------------- of answers to the same prompts


def pass_at_k(count: Array, correct: Array, k: int) -> Array:
    """Chance that k answers contain a right one, from `correct` right ones among `count`; any shape.

        1 - C(n-c, k)/C(n, k) = 1 - Π_{j<k} (n-c-j)/(n-j)        1 where n - c < k

    Unbiased (arXiv:2107.03374, eq. 1). NaN where it cannot be told: fewer than k answers and none right.
    """
    n, c = jnp.asarray(count)[..., None], jnp.asarray(correct)[..., None]
    j = jnp.arange(k).reshape((1,) * (n.ndim - 1) + (k,))
    factor = jnp.maximum(n - c - j, 0) / jnp.maximum(n - j, 1)
    return jnp.where((c > 0) | (n >= k), 1.0 - factor.prod(axis=-1, keepdims=True), jnp.nan)[..., 0]


def solve_rates(
    correct: Array, group: Array, judged: Array, ks: tuple[int, ...] = (1,), answers: Array | None = None
) -> dict[str, Array]:
    """`avg@k`, `pass@k` and, where `answers` [B] tells equal answers by equal numbers, `maj@k`: means over prompts.

    correct, judged [B] bool. avg@k is the share of right ones among the first k judged answers of a prompt, maj@k the
    chance that the most common of these is right, ties broken evenly; pass@k is estimated from all of them. Prompts
    without a judged answer are left out.
    """
    place = _place_in_group(group, judged)
    count, right = groups.group_count(group, judged), groups.group_sum((correct & judged).astype(float), group)
    out = {}
    for k in ks:
        first = judged & (place < k)
        out[f"avg@{k}"] = _mean_over_prompts(groups.group_mean(correct.astype(float), group, first), group, judged)
        out[f"pass@{k}"] = _mean_over_prompts(pass_at_k(count, right, k), group, judged)
        if answers is not None:
            out[f"maj@{k}"] = _mean_over_prompts(majority_correct(answers, correct, group, first), group, judged)
    return out


def majority_correct(answers: Array, correct: Array, group: Array, valid: Array) -> Array:
    """[B] the chance that the most common answer among a group's valid rows is right, ties broken evenly."""
    _, same = jnp.unique(jnp.stack([group, answers]), axis=1, return_inverse=True, size=group.shape[0])
    votes = jnp.where(valid, groups.group_count(same, valid), 0.0)
    _, ids = jnp.unique(group, return_inverse=True, size=group.shape[0])
    most = jax.ops.segment_max(votes, ids, num_segments=group.shape[0])[ids]
    return groups.group_mean(correct.astype(float), group, valid & (votes == most))


def _mean_over_prompts(x: Array, group: Array, judged: Array) -> Array:
    """Mean over groups of x, which is the same on all rows of one; groups without a judged row are left out."""
    share = jnp.where(judged, 1.0 / jnp.maximum(groups.group_count(group, judged), 1.0), 0.0)
    return jnp.where(judged, share * x, 0.0).sum() / jnp.maximum(share.sum(), 1.0)


def _place_in_group(group: Array, valid: Array) -> Array:
    """[B] how many valid rows of the same group stand before each row."""
    order = jnp.argsort(group, stable=True)
    counted = valid[order].astype(jnp.int32)
    before = jnp.cumsum(counted) - counted
    _, ids = jnp.unique(group[order], return_inverse=True, size=group.shape[0])
    start = jax.ops.segment_min(before, ids, num_segments=group.shape[0])[ids]
    return jnp.zeros_like(before).at[order].set(before - start)
