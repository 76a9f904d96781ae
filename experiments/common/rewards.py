"""Rewards by name, and rewards of a control."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.ops.shaping import at_last_decision
from rljax.types import Trajectory


def read_rewards(names: tuple[str, ...], legal: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, float]]:
    """Verifiers and their weights, both by name, from NAME or NAME=WEIGHT.

    Raises ValueError for a name that is not in `legal`, and for a weight that is no number.
    """
    weights = {}
    for item in names:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1.0)
        except ValueError:
            name = ""
        if name not in legal:
            raise ValueError(f"reward {item!r}; legal: {', '.join(legal)}, each with =WEIGHT or without")
    return {name: legal[name] for name in weights}, weights


def control_rewards(traj: Trajectory, kind: str, key) -> Trajectory:
    """Rewards that know nothing of the completions, unless kind is "exact": then those that `traj` has.

    "random": coin flips, 3 in 10 rewarded. "shuffled": each row gets the reward of another row.
    """
    if kind == "exact":
        return traj
    total = jnp.sum(traj.rewards, axis=1)
    if kind == "random":
        other = jax.random.bernoulli(key, 0.3, total.shape).astype(total.dtype)
    else:
        other = jax.random.permutation(key, total)
    return traj.replace(rewards=at_last_decision(other, traj.mask), scores=other[:, None])
