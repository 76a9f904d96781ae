"""What a rollout shows before anything is learnt: rewards by name, lengths, signal, distance to the reference."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops import groups
from rljax.types import Trajectory


def describe(traj: Trajectory, names: tuple[str, ...]) -> dict:
    """Scalars of a judged rollout, explained in docs/metrics.md. `names`: of the verifiers, as in `scores`."""
    return _describe(traj, tuple(names))


@partial(jax.jit, static_argnames="names")
def _describe(traj: Trajectory, names: tuple[str, ...]) -> dict:
    total = jnp.where(traj.mask, traj.rewards, 0.0).sum(axis=1)
    judged = jnp.isfinite(total) & traj.mask.any(axis=1)
    length = traj.mask.sum(axis=1)
    out = {
        "reward": _mean(total, judged),
        "reward_std": jnp.sqrt(_mean((total - _mean(total, judged)) ** 2, judged)),
        "length": length.mean(),
        "length_max": length.max(),
        "not_judged": 1.0 - judged.mean(),
        "no_signal": _no_signal(total, judged, traj.group),
        "tokens": length.sum(),
    }
    if traj.truncated is not None:
        out["truncated"] = (traj.truncated & traj.mask).any(axis=1).mean()
    if traj.ref_logp is not None:
        drift = jnp.where(traj.mask, traj.logp - traj.ref_logp, 0.0).sum(axis=1)
        out["kl_sequence"] = drift.mean()
    for k, name in enumerate(names):
        score = traj.scores[:, k]
        out[f"reward/{name}"] = _mean(score, jnp.isfinite(score))
    return out


def reward_and_kl(traj: Trajectory) -> dict[str, float]:
    """Mean reward of the judged rows with its standard error, and the KL to the reference in nats a sequence."""
    total = np.where(traj.mask, traj.rewards, 0.0).sum(axis=1)
    total = total[np.isfinite(total) & np.any(traj.mask, axis=1)]
    error = total.std(ddof=1) / len(total) ** 0.5 if len(total) > 1 else np.nan
    kl = np.where(traj.mask, np.asarray(traj.logp) - np.asarray(traj.ref_logp), 0.0).sum(axis=1).mean()
    return {"reward": float(total.mean()), "error": float(error), "kl": float(kl)}


def _mean(x, valid):
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def _no_signal(total, judged, group):
    """Share of rows whose group gave every judged row the same reward: nothing to learn from by comparison."""
    reward = jnp.where(judged, total, 0.0)
    return (groups.group_std(reward, group, judged) < 1e-6).mean()


def average(steps: Iterable[dict]) -> dict:
    """Mean of each metric over the updates of one rollout; *_max and *_min by extremum."""
    steps = list(steps)
    reduce = {"_max": max, "_min": min}
    out = {}
    for name in steps[0]:
        values = [float(metrics[name]) for metrics in steps]
        out[name] = reduce.get(name[-4:], lambda v: sum(v) / len(v))(values)
    return out


def require_on_policy(metrics: dict, limit: float = 1e-3) -> None:
    """At the first update of a run the trainer's log-probs must be the sampler's.

    Raises RuntimeError where they differ by more than `limit` nats: sampler and trainer then disagree on the model, the
    temperature or the tokens, and every ratio would be wrong.
    """
    gap = float(metrics["sampler_gap"])
    if not gap <= limit:
        raise RuntimeError(
            f"sampler and trainer log-probs differ by up to {gap:.2g} nats at the first update (limit {limit:g})"
        )
