"""How one recorded file of a peer is held against rljax: a row of the tables in this folder."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import Trajectory


class Case(NamedTuple):
    """One recorded call of the peer's function."""

    name: str
    hyper: dict  # the peer's arguments, from the file's metadata
    ins: dict  # name -> array, float64. Rows that answer one prompt are told by ins["index"], whatever the peer does
    outs: dict  # name -> what the peer returned
    width: int  # columns of the recorded arrays: some peers divide by it
    order: np.ndarray | None = None  # of the rows, where they are not as recorded: for peers that take the first ones


class Entry(NamedTuple):
    """What of rljax a file pins, and how."""

    pins: str  # functions of rljax/algorithms by name, others from rljax: "rloo, ops.returns.gae" (docs/algorithms.md)
    run: Callable[[Case], dict]  # our answer, name for name as the peer's outs
    rtol: float = 1e-9  # 1e-5 where the peer works in float32 inside
    mask: str | None = None  # the input that is the mask: such cases are also fed permuted and widened
    at_mask: bool = False  # the peer leaves numbers at masked places: compare [B T] outs only where the mask is 1
    halves: bool = False  # rows i and i + B/2 belong together
    still: tuple[str, ...] = ("reward_weights",)  # inputs without rows
    not_compared: Mapping[str, str] = MappingProxyType({})  # name of an out (fnmatch) -> why
    not_moved: str | None = None  # why no permuted and widened copy is fed
    not_run: Mapping[str, str] = MappingProxyType({})  # name of a case (fnmatch) -> why


def trajectory(mask, **fields) -> Trajectory:
    """Facts of decisions whose tokens do not matter."""
    nothing = jnp.zeros(mask.shape)
    return Trajectory(**{"inputs": nothing, "actions": nothing, "logp": nothing, "mask": mask, **fields})


def gradient(loss: Callable, ins: dict, *names: str) -> tuple:
    """(loss(ins), gradients of it by each named input)."""

    def of(values):
        return loss({**ins, **dict(zip(names, values, strict=True))})

    value, grads = jax.value_and_grad(of)(tuple(ins[name] for name in names))
    return value, *grads


def moved(case: Case, entry: Entry, seed: int = 0, wider: int = 3) -> tuple[Case, np.ndarray]:
    """The same rows in another order, `wider` columns of garbage on the right, groups under other names."""
    draw = np.random.default_rng(seed)
    B, T = np.shape(case.ins[entry.mask])
    order = draw.permutation(B)
    if entry.halves:
        half = draw.permutation(B // 2)
        order = np.concatenate([half, half + B // 2])

    def move(name, x):
        x = np.asarray(x)
        if name in entry.still or x.ndim == 0:
            return x
        if entry.halves and x.shape[0] == B // 2:
            return x[order[: B // 2]]
        if x.shape[0] != B:
            return x
        x = x[order]
        if name == "index":
            return 1000 - 3 * x
        if x.ndim < 2 or x.shape[1] != T:
            return x
        extra = (B, wider, *x.shape[2:])
        if "mask" in name:
            garbage = np.full(extra, "padding" in name)
        elif name == entry.mask:  # labels: -100 is none
            garbage = np.full(extra, -100)
        elif x.dtype.kind == "f":
            garbage = draw.normal(size=extra) - 2.0
        else:
            garbage = np.full(extra, x[0, 0] if x.ndim == 2 else 0)
        return np.concatenate([x, garbage.astype(x.dtype)], axis=1)

    return case._replace(ins={name: move(name, x) for name, x in case.ins.items()}, order=order), order
