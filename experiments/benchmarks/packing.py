r"""One GRPO update on work W1 with completions of all lengths: rows as sampled against packed rows, side by side; each
also with prompts computed once, for all their completions or for those in a packed row.

    python experiments/benchmarks/packing.py

The same batch: 8 prompts of 32 tokens x 8 completions, cut at lengths drawn evenly from 1 to 64. A device computes as
many tokens at a time either way; the time of a packed update includes its planning and gathering on the host.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.common import W1, Output, alternately, named, prompts, run, trace, write_figures
from rljax.algorithms import grpo
from rljax.models import decoder, policy
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table
from rljax.train.objective import policy_objective
from rljax.train.packing import SharedColumns, make_packed_update
from rljax.train.shared_prefix import make_shared_prefix_update, share_prefix
from rljax.train.update import UpdateFn, make_update
from rljax.types import Batch, Sampling, TrainState

COMPLETIONS = 8  # of each prompt
PROMPT_COLUMNS = 31  # its last token is the input of the first decision


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """The best time of both updates."""

    repeats: int = 7  # timed runs of each
    micro_batches: int = 4  # of the unpacked update
    rows_as_wide: float = 1.0  # width of a packed row, over that of a row as sampled


def cut_batch() -> Batch:
    """Completions of all lengths, each right or wrong."""
    rng = np.random.default_rng(0)
    params = policy.init(W1, jax.random.key(0))
    rows = prompts(W1, 8, PROMPT_COLUMNS + 1)
    traj = sample(decoder.language_model(W1), params, {}, rows, Sampling(n=COMPLETIONS, max_tokens=64), 0, 0)
    ends = PROMPT_COLUMNS + rng.integers(1, 65, (64, 1))  # the first token of a completion is the action of that column
    column = np.arange(traj.mask.shape[1])[None]
    inside = column < ends
    rewards = np.where(column == ends - 1, rng.integers(0, 2, (64, 1)), 0.0)
    segments = jnp.where(inside, traj.segments, 0)
    traj = traj.replace(segments=segments, mask=traj.mask & inside, rewards=jnp.float32(rewards))
    return grpo().credit(traj, {})


def padding_of(batch: Batch, metrics: dict) -> float:
    """The share of the columns that an update with these metrics computes which hold no token."""
    if "padding_after" in metrics:
        return metrics["padding_after"]
    parts = [batch.traj.segments]
    if metrics.get("shared_prefix"):
        shared = share_prefix(batch, PROMPT_COLUMNS, COMPLETIONS).traj
        parts = [shared.segments, shared.prefix.segments]
    tokens = sum(int((part > 0).sum()) for part in parts)
    return 1 - tokens / sum(part.size for part in parts)


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    batch = cut_batch()
    objective = policy_objective(policy.make_policy(W1), grpo())
    optimizer = optax.adamw(1e-4)
    params = policy.init(W1, jax.random.key(0))
    columns = batch.mask.shape[1]
    tokens = batch.mask.size // cfg.micro_batches
    width = round(columns * cfg.rows_as_wide)
    shared = SharedColumns(PROMPT_COLUMNS, COMPLETIONS)

    def make(micro_batches: int) -> UpdateFn:
        return make_update(objective, optimizer, micro_batches)

    updates = {
        "as sampled": make(cfg.micro_batches),
        "as sampled, prompts shared": make_shared_prefix_update(make(cfg.micro_batches), *shared),
        "packed": make_packed_update(make, tokens, width),
        "packed, prompts shared": make_packed_update(make, tokens, width, shared=shared),
    }
    states = {}
    for name in updates:
        copied = jax.tree.map(jnp.copy, params)  # an update donates its state
        states[name] = TrainState(0, copied, optimizer.init(params), jax.random.key(1))
    first = {}

    def work(name):
        def learn(i):
            states[name], metrics = updates[name](states[name], batch)
            first.setdefault(name, jax.device_get(metrics))
            return metrics

        return learn

    works = {name: work(name) for name in updates}
    times = alternately(works, cfg.repeats)
    trace(works, cfg.profile)
    text = batch.mask.size * (1 - first["packed"]["padding_before"])
    log_info(f"{text:.0f} tokens of text in {columns} columns, packed in {width}; {tokens} tokens at a time")
    lines = []
    for name, measured in times.items():
        t = min(measured)
        speed = {"": name, "seconds": t, "tokens/s": text / t}
        shape = {
            "padding": padding_of(batch, first[name]),
            "micro-batches": first[name].get("micro_batches", cfg.micro_batches),
        }
        same = {metric: float(first[name][metric]) for metric in ("loss", "grad_norm")}
        lines.append(speed | shape | same)
    table("W1", lines)
    figures = named(lines, "W1, ")
    write_figures(cfg.json, figures)
    return figures


if __name__ == "__main__":
    run(Config, main)
