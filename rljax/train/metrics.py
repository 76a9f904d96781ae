"""What a rollout shows before anything is learnt: rewards by name, lengths, signal, distance to the reference."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from rljax.ops import groups
from rljax.ops.returns import episode_rewards
from rljax.ops.statistics import masked_mean, masked_var
from rljax.types import Trajectory


def describe(traj: Trajectory, names: tuple[str, ...]) -> dict:
    """Scalars of a judged rollout, explained in docs/metrics.md. `names`: of the verifiers, as in `scores`."""
    return _describe(traj, tuple(names))


@partial(jax.jit, static_argnames="names")
def _describe(traj: Trajectory, names: tuple[str, ...]) -> dict:
    total, judged = episode_rewards(traj.rewards, traj.mask)
    length = traj.mask.sum(axis=1)
    mean = masked_mean(total, judged)
    out = {
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean((total - mean) ** 2, judged)),
        "length": length.mean(),
        "length_max": length.max(),
        "not_judged": 1.0 - judged.mean(),
        "no_signal": groups.no_signal(total, traj.group, judged).mean(),
        "tokens": length.sum(),
    }
    if traj.truncated is not None:
        out["truncated"] = (traj.truncated & traj.mask).any(axis=1).mean()
    if traj.ref_logp is not None:
        out["kl_sequence"] = _drift(traj).mean()
    for k, name in enumerate(names):
        score = traj.scores[:, k]
        out[f"reward/{name}"] = masked_mean(score, jnp.isfinite(score))
    return out


def _drift(traj: Trajectory):
    """Σ_t log π_behaviour - log π_ref of each row, nats."""
    return jnp.where(traj.mask, traj.logp - traj.ref_logp, 0.0).sum(axis=1)


def reward_and_kl(traj: Trajectory) -> dict[str, float]:
    """Mean reward of the judged rows with its standard error, and the KL to the reference in nats a sequence."""
    total, judged = episode_rewards(jnp.asarray(traj.rewards), traj.mask)
    error = jnp.sqrt(masked_var(total, judged) / jnp.maximum(judged.sum(), 1))
    return {"reward": float(masked_mean(total, judged)), "error": float(error), "kl": float(_drift(traj).mean())}


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
