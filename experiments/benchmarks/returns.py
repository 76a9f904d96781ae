r"""Returns and advantages, against a copy of 256 MiB in the same process.

    python experiments/benchmarks/returns.py
    python experiments/benchmarks/returns.py --rows 1000 --decisions 1000     # strides that are no power of two

A bound is bytes moved / bandwidth. GAE reads rewards, discounts and values and writes advantages; V-trace also reads
ratios and writes targets; a mask is not counted. There are two: by jax's copy of 256 MiB, whose result is new memory
each time (the bandwidth of the other benchmarks), and by numpy's into memory written before.

Time-major arrays are [T, B], handed over as `gae(r.T, v.T, None, γ.T).T` inside one jit: the turns cancel. What [B, T]
takes beyond that is the layout; the last column is what a kernel that reads it as it lies could gain.
"""

import dataclasses
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import alternately, bandwidth

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


def main(cfg: Config) -> None:
    B, T, rng = cfg.rows, cfg.decisions, np.random.default_rng(0)
    rewards, values, ratios = rng.normal(size=(B, T)), rng.normal(size=(B, T + 1)), rng.lognormal(size=(B, T))
    discounts, mask = np.where(rng.random((B, T)) < 0.01, 0.0, 0.99), rng.random((B, T)) < 0.9
    flat = [
        jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32) for x in (rewards, values, discounts, ratios, mask)
    ]
    tall = [jnp.copy(x.T) for x in flat]
    turn = lambda tree: jax.tree.map(jnp.transpose, tree)  # noqa: E731

    works = {
        "gae": lambda r, v, d, w, m: gae(r, v, None, d),
        "gae with a mask": lambda r, v, d, w, m: gae(r, v, m, d),
        "vtrace": lambda r, v, d, w, m: vtrace_returns(r, v, w, None, d),
        "vtrace with a mask": lambda r, v, d, w, m: vtrace_returns(r, v, w, m, d),
    }
    kernels = {(name, "[B, T]"): (jax.jit(work), flat) for name, work in works.items()}
    kernels |= {
        (name, "time-major"): (jax.jit(lambda *x, work=work: turn(work(*turn(x)))), tall)
        for name, work in works.items()
    }
    copies, medians = {"jax": [], "numpy": []}, {key: [] for key in kernels}
    for _ in range(cfg.rounds):
        copies["jax"].append(bandwidth(1))
        copies["numpy"].append(numpy_copy())
        for key, (kernel, facts) in kernels.items():
            medians[key].append(median(alternately({"": lambda _: kernel(*facts)}, cfg.repeats)[""]))  # noqa: B023

    bandwidths = {name: max(speeds) for name, speeds in copies.items()}
    shown = ", ".join(f"{name} {speed / 1e9:.1f} GB/s" for name, speed in bandwidths.items())
    log_info(f"copy of 256 MiB: {shown}; [{B}, {T}] float32")
    rows = []
    for name in works:
        moved = 4 * (4 * B * T + B + (2 * B * T if "vtrace" in name else 0))
        best = {layout: min(medians[name, layout]) for layout in ("time-major", "[B, T]")}
        row = {"": name, "MB": moved / 1e6} | {f"{layout}, ms": seconds * 1e3 for layout, seconds in best.items()}
        for copy, speed in bandwidths.items():
            row |= {f"{layout} / {copy}'s copy": seconds * speed / moved for layout, seconds in best.items()}
        rows.append(row | {"a transposed kernel would gain": best["[B, T]"] / best["time-major"]})
    table("returns", rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
