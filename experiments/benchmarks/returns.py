r"""Returns and advantages, against a copy of 256 MiB in the same process.

    python experiments/benchmarks/returns.py
    python experiments/benchmarks/returns.py --rows 1000 --decisions 1000     # strides that are no power of two

A bound is bytes moved / bandwidth. GAE reads rewards, discounts and values and writes advantages; V-trace also reads
ratios and writes targets; a mask is not counted. There are two: by jax's copy of 256 MiB, whose result is new memory
each time (the bandwidth of the other benchmarks), and by numpy's into memory written before.

Time-major arrays are [T, B], handed over as `gae(r.T, v.T, None, γ.T).T` inside one jit: the transpositions cancel.
What [B, T] takes beyond that is due to the layout; the last column is what a kernel for that layout could gain.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks.common import alternately, bandwidth
from rljax.ops.returns import gae, vtrace_returns
from rljax.train.log import log_info, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Of each kernel the best round's median: what else runs on the machine only ever makes a round slower."""

    rows: int = 1024  # B
    decisions: int = 1024  # T
    repeats: int = 15  # timed runs in a round, one after another
    rounds: int = 8  # the kernels take turns


def numpy_copy() -> float:
    """Bytes a second of numpy's copy of 256 MiB, read and written, at its best of 10."""
    source, target = np.ones((2, 2**26), np.float32)
    return 2 * source.nbytes / min(alternately({"": lambda _: np.copyto(target, source)}, 10)[""])


WORKS = {
    "gae": lambda r, v, d, w, m: gae(r, v, None, d),
    "gae with a mask": lambda r, v, d, w, m: gae(r, v, m, d),
    "vtrace": lambda r, v, d, w, m: vtrace_returns(r, v, w, None, d),
    "vtrace with a mask": lambda r, v, d, w, m: vtrace_returns(r, v, w, m, d),
}


def random_arrays(B: int, T: int) -> list[jax.Array]:
    """Rewards, values, discounts, importance ratios, mask."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(B, T))
    values = rng.normal(size=(B, T + 1))
    ratios = rng.lognormal(size=(B, T))
    discounts = np.where(rng.random((B, T)) < 0.01, 0.0, 0.99)
    mask = rng.random((B, T)) < 0.9
    return [*(jnp.asarray(x, jnp.float32) for x in (rewards, values, discounts, ratios)), jnp.asarray(mask)]


def time_major(work: Callable, *arrays: jax.Array):
    """The work on [T, B] arrays, by transposing them and its result."""
    return jax.tree.map(jnp.transpose, work(*(x.T for x in arrays)))


def main(cfg: Config) -> None:
    B, T = cfg.rows, cfg.decisions
    arrays = random_arrays(B, T)
    time_major_arrays = [jnp.copy(x.T) for x in arrays]
    kernels = {}
    for name, work in WORKS.items():
        kernels[name, "[B, T]"] = jax.jit(work), arrays
        kernels[name, "time-major"] = jax.jit(partial(time_major, work)), time_major_arrays
    copies = {"jax": [], "numpy": []}
    medians = {key: [] for key in kernels}
    for _ in range(cfg.rounds):
        copies["jax"].append(bandwidth(1))
        copies["numpy"].append(numpy_copy())
        for key, (kernel, facts) in kernels.items():
            medians[key].append(median(alternately({"": lambda _: kernel(*facts)}, cfg.repeats)[""]))  # noqa: B023

    bandwidths = {name: max(speeds) for name, speeds in copies.items()}
    shown = ", ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in bandwidths.items())
    log_info(f"copy of 256 MiB: {shown}; [{B}, {T}] float32")
    rows = []
    for name in WORKS:
        moved = 4 * (4 * B * T + B + (2 * B * T if "vtrace" in name else 0))
        best = {layout: min(medians[name, layout]) for layout in ("time-major", "[B, T]")}
        row = {"": name, "MB": moved / 1e6} | {f"{layout}, ms": seconds * 1e3 for layout, seconds in best.items()}
        for copy, speed in bandwidths.items():
            row |= {f"{layout} / {copy}'s copy": seconds * speed / moved for layout, seconds in best.items()}
        rows.append(row | {"a transposed kernel would gain": best["[B, T]"] / best["time-major"]})
    table("returns", rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
