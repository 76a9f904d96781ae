"""What a run logs: a rollout before anything is learnt, its credit, and the updates of one rollout as one."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from rljax.ops.returns import episode_rewards
from rljax.ops.statistics import masked_mean, masked_var
from rljax.train import diagnostics
from rljax.types import Batch, Trajectory


def describe(traj: Trajectory, names: tuple[str, ...], solved: float = 1.0) -> dict:
    """Scalars of a judged rollout, explained in docs/metrics.md. `names`: of the verifiers, as in `scores`; `solved`:
    the least total reward of a right answer.
    """
    return _describe(traj, tuple(names), solved)


_describe = jax.jit(diagnostics.rollout, static_argnums=1)


def credit_metrics(batch: Batch) -> dict:
    """Scalars of a credited rollout: advantages, values and their targets, explained variance."""
    return _describe_credit(batch)


_describe_credit = jax.jit(diagnostics.credit)


def reward_and_kl(traj: Trajectory) -> dict[str, float]:
    """Mean reward of the judged rows with its standard error, and the KL to the reference in nats a sequence."""
    total, judged = episode_rewards(jnp.asarray(traj.rewards), traj.mask)
    error = jnp.sqrt(masked_var(total, judged) / jnp.maximum(judged.sum(), 1))
    return {
        "reward": float(masked_mean(total, judged)),
        "error": float(error),
        "kl": float(diagnostics.drift(traj).mean()),
    }


def average(steps: Iterable[dict]) -> dict:
    """Mean of each metric over the updates of one rollout, *_max and *_min by extremum, and what is made of these."""
    steps = list(steps)
    reduce = {"_max": max, "_min": min}
    out = {}
    for name in steps[0]:
        values = [float(metrics[name]) for metrics in steps]
        out[name] = reduce.get(name[-4:], lambda v: sum(v) / len(v))(values)
    return diagnostics.derived(out)


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
