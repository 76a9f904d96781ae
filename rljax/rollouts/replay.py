"""Replay: a ring of transitions, and n-step transitions out of unrolls. Pure functions over arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rljax.types import Trajectory, Transition


class Replay(NamedTuple):
    rows: Any  # a pytree, [capacity ...] each
    written: jax.Array  # rows ever written; the newest `capacity` of them are there


def empty(example, capacity: int) -> Replay:
    """Room for `capacity` rows like `example`, whose leaves have no leading axis (arrays, or shapes with dtypes)."""
    return Replay(jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example), jnp.int32(0))


def add(replay: Replay, rows) -> Replay:
    """The replay with n rows more, over the oldest ones where it is full.

    Raises ValueError where n does not divide the capacity: a write would run over the end.
    """
    capacity, n = (jax.tree.leaves(tree)[0].shape[0] for tree in (replay.rows, rows))
    if capacity % n:
        raise ValueError(f"{n} rows at a time do not divide a replay of {capacity}")
    at = replay.written % capacity
    written = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0), replay.rows, rows)
    return Replay(written, replay.written + n)


def draw(replay: Replay, bits):
    """As many of the rows that are there as there are random `bits` (uint32 [n]), uniformly, with replacement.

    Uniform to a share of capacity / 2³².
    """
    capacity = jax.tree.leaves(replay.rows)[0].shape[0]
    where = bits % jnp.minimum(replay.written, capacity).astype(jnp.uint32)
    return jax.tree.map(lambda x: x[where], replay.rows)


def transitions(traj: Trajectory, gamma, n: int = 1) -> Transition:
    """[N T] decisions of an unroll as N·T transitions of n steps, of fewer where the episode or the unroll ends.

        reward = Σ_{k<m} γ^k r_{t+k}        discount = γ^m, 0 where the m-th step terminated

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n-step transitions need n >= 1, not {n}")
    T = traj.mask.shape[1]
    reward, discount = jnp.zeros_like(traj.rewards), jnp.ones_like(traj.rewards)
    following, going = traj.next_inputs, jnp.ones(traj.mask.shape, bool)
    for k in range(min(n, T)):

        def ahead(x, k=k):  # column t + k; nothing beyond T
            return jnp.pad(x[:, k:], ((0, 0), (0, k)) + ((0, 0),) * (x.ndim - 2))

        going &= ahead(traj.mask)
        reward += jnp.where(going, discount * ahead(traj.rewards), 0.0)
        discount = jnp.where(going, jnp.where(ahead(traj.terminated), 0.0, discount * gamma), discount)
        wide = going.reshape(going.shape + (1,) * (following.ndim - 2))
        following = jnp.where(wide, ahead(traj.next_inputs), following)
        going &= ~ahead(traj.terminated | traj.truncated)
    found = Transition(traj.inputs, traj.actions, reward, following, discount)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
