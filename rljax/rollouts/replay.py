"""Replay buffer: a ring of transitions, and n-step transitions out of unrolls. Pure functions over arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rljax.types import Array, Trajectory, Transition


class ReplayBuffer(NamedTuple):
    rows: Any  # a pytree, [capacity ...] each
    written: Array  # [] rows ever written; the buffer holds the newest `capacity` of them


def init_buffer(example: Any, capacity: int) -> ReplayBuffer:
    """Room for `capacity` rows like `example`, whose leaves have no leading axis (arrays, or shapes with dtypes)."""
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
    return ReplayBuffer(rows, jnp.int32(0))


def add_to_buffer(buffer: ReplayBuffer, rows: Any) -> ReplayBuffer:
    """The buffer with n rows more, over the oldest ones where it is full.

    Raises ValueError where n does not divide the capacity: a write would run over the end.
    """
    capacity = _num_rows(buffer.rows)
    n = _num_rows(rows)
    if capacity % n:
        raise ValueError(f"{n} rows at a time do not divide a replay buffer of {capacity}")
    start = buffer.written % capacity

    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, 0)

    return ReplayBuffer(jax.tree.map(write, buffer.rows, rows), buffer.written + n)


def sample_from_buffer(buffer: ReplayBuffer, bits: Array) -> Any:
    """Rows of the buffer, one for each of the random `bits` (uint32 [n]), uniformly, with replacement.

    Uniform to a share of capacity / 2³².
    """
    num_valid = jnp.minimum(buffer.written, _num_rows(buffer.rows))
    index = bits % num_valid.astype(jnp.uint32)
    return jax.tree.map(lambda x: x[index], buffer.rows)


def _num_rows(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def transitions(traj: Trajectory, gamma: float | Array, n: int = 1) -> Transition:
    """[N T] decisions of an unroll as N·T transitions of n steps, of fewer where the episode or the unroll ends.

        reward = Σ_{k<m} γ^k r_{t+k}        discount = γ^m, 0 where the m-th step terminated

    Where the mask leaves a decision out (after an episode's end) there is no transition: reward, discount and `weight`
    are 0 there, and 1 is the weight of the others.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n-step transitions need n >= 1, not {n}")
    T = traj.mask.shape[1]
    reward = jnp.zeros_like(traj.rewards)
    discount = jnp.ones_like(traj.rewards)
    next_observation = traj.next_inputs
    active = jnp.ones(traj.mask.shape, bool)
    for k in range(min(n, T)):

        def ahead(x, k=k):  # column t + k; nothing beyond T
            return jnp.pad(x[:, k:], ((0, 0), (0, k)) + ((0, 0),) * (x.ndim - 2))

        active &= ahead(traj.mask)
        reward += jnp.where(active, discount * ahead(traj.rewards), 0.0)
        discount = jnp.where(active, jnp.where(ahead(traj.terminated), 0.0, discount * gamma), discount)
        wide = active.reshape(active.shape + (1,) * (next_observation.ndim - 2))
        next_observation = jnp.where(wide, ahead(traj.next_inputs), next_observation)
        active &= ~ahead(traj.terminated | traj.truncated)
    discount = jnp.where(traj.mask, discount, 0.0)
    weight = traj.mask.astype(discount.dtype)
    found = Transition(traj.inputs, traj.actions, reward, next_observation, discount, weight)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
