r"""Returns and advantages, against copies of as many bytes in the same process.

    python experiments/benchmarks/returns.py
    python experiments/benchmarks/returns.py --rows 1000 --decisions 1000     # strides that are no power of two

GAE reads rewards, discounts and values and writes advantages; V-trace also reads ratios and writes targets; a mask is
not counted. As many bytes, read and written, are copied by numpy, into memory that was written before, and by jax, into
new memory, as all its results are: the system hands it out page by page, which costs more than the copy.

Time-major arrays are [T, B], handed over as `gae(r.T, v.T, None, γ.T).T` inside one jit: the transpositions cancel.
What [B, T] takes beyond that is due to the layout; the last column is what a kernel for that layout could gain at most.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Output, alternately, named, run, trace, write_figures
from rljax.ops.returns import gae, vtrace_returns
from rljax.train.log import table


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Of each kernel the best round's median: what else runs on the machine only ever makes a round slower."""

    rows: int = 1024  # B
    decisions: int = 1024  # T
    repeats: int = 15  # timed runs in a round, one after another
    rounds: int = 8  # the kernels take turns


def copies(num_bytes: int) -> dict[str, Callable[[int], object]]:
    """work(i): read and write so many bytes together."""
    source, target = np.ones((2, num_bytes // 8), np.float32)
    on_device = jnp.asarray(source)
    return {"numpy's copy": lambda _: np.copyto(target, source), "jax's copy": lambda _: jnp.copy(on_device)}


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


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    B, T = cfg.rows, cfg.decisions
    arrays = random_arrays(B, T)
    time_major_arrays = [jnp.copy(x.T) for x in arrays]
    moved = {name: 4 * (4 * B * T + B + (2 * B * T if "vtrace" in name else 0)) for name in WORKS}
    works = {}
    for name, work in WORKS.items():
        works |= {(name, whose): copy for whose, copy in copies(moved[name]).items()}
        works[name, "time-major"] = partial(call, jax.jit(partial(time_major, work)), time_major_arrays)
        works[name, "[B, T]"] = partial(call, jax.jit(work), arrays)
    medians = {key: [] for key in works}
    for _ in range(cfg.rounds):
        for key, work in works.items():
            medians[key].append(median(alternately({"": work}, cfg.repeats)[""]))
    trace({" ".join(key): work for key, work in works.items()}, cfg.profile)

    times, ratios = [], []
    for name in WORKS:
        best = {what: min(medians[name, what]) for what in ("numpy's copy", "jax's copy", "time-major", "[B, T]")}
        milliseconds = {f"{what}, ms": 1e3 * seconds for what, seconds in best.items()}
        times.append({"": name, "MB": moved[name] / 1e6} | milliseconds)
        line = {"": name}
        for layout in ("time-major", "[B, T]"):
            line |= {f"{layout} / {copy}": best[layout] / best[copy] for copy in ("numpy's copy", "jax's copy")}
        ratios.append(line | {"[B, T] / time-major": best["[B, T]"] / best["time-major"]})
    table(f"[{B}, {T}] float32", times)
    table("of a copy, and of the other layout", ratios)
    figures = named(times, f"[{B}, {T}], ") | named(ratios, f"[{B}, {T}], ")
    write_figures(cfg.json, figures)
    return figures


def call(kernel: Callable, arrays: list[jax.Array], _: int):
    return kernel(*arrays)


if __name__ == "__main__":
    run(Config, main)
