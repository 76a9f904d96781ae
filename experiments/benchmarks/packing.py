r"""One GRPO update on work W1 with answers of all lengths: rows as sampled against packed rows, side by side.

    python experiments/benchmarks/packing.py

The same batch: 8 prompts of 32 tokens x 8 answers, cut at lengths drawn evenly from 1 to 64. A device computes as many
tokens at a time either way; what a packed update does on the host, planning and gathering, is in its time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import W1, alternately, prompts
from rljax.rollouts.sampler import sample

from rljax.algorithms import grpo
from rljax.models import decoder, policy
from rljax.train.log import log_info, table
from rljax.train.objective import policy_objective
from rljax.train.packing import make_packed_update
from rljax.train.update import make_update
from rljax.types import Batch, Sampling, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """The best time of both updates."""

    repeats: int = 7  # timed runs of each
    micro_batches: int = 4  # of the unpacked update
    rows_as_wide: float = 1.0  # width of a packed row, over that of a row as sampled


def cut_batch() -> Batch:
    """Answers of all lengths, each right or wrong."""
    rng = np.random.default_rng(0)
    params = policy.init(W1, jax.random.key(0))
    traj = sample(decoder.language_model(W1), params, {}, prompts(W1, 8, 32), Sampling(n=8, max_tokens=64), 0, 0)
    ends = 31 + rng.integers(1, 65, (64, 1))  # the first answer's token is the action of column 31
    inside = np.arange(traj.mask.shape[1])[None] < ends
    rewards = np.where(np.arange(traj.mask.shape[1])[None] == ends - 1, rng.integers(0, 2, (64, 1)), 0.0)
    segments, mask = jnp.where(inside, traj.segments, 0), traj.mask & inside
    return grpo().credit(traj.replace(segments=segments, mask=mask, rewards=jnp.float32(rewards)), {})


def main(cfg: Config) -> None:
    batch, objective, optimizer = cut_batch(), policy_objective(policy.make_policy(W1), grpo()), optax.adamw(1e-4)
    params = policy.init(W1, jax.random.key(0))
    columns, tokens = batch.mask.shape[1], batch.mask.size // cfg.micro_batches
    width = round(columns * cfg.rows_as_wide)
    updates = {
        "as sampled": make_update(objective, optimizer, cfg.micro_batches),
        "packed": make_packed_update(lambda m: make_update(objective, optimizer, m), tokens, width),
    }
    states = {
        n: TrainState(0, jax.tree.map(jnp.copy, params), optimizer.init(params), jax.random.key(1)) for n in updates
    }
    first, last = {}, {}

    def work(name):
        def learn(i):
            states[name], last[name] = updates[name](states[name], batch)
            first.setdefault(name, jax.device_get(last[name]))
            return last[name]

        return learn

    times = {n: min(t) for n, t in alternately({n: work(n) for n in updates}, cfg.repeats).items()}
    text = batch.mask.size * (1 - first["packed"]["padding_before"])
    padding = {"as sampled": first["packed"]["padding_before"], "packed": first["packed"]["padding_after"]}
    pieces = {"as sampled": cfg.micro_batches, "packed": first["packed"]["micro_batches"]}
    log_info(f"{text:.0f} tokens of text in {columns} columns, packed in {width}; {tokens} tokens at a time")
    table(
        "W1",
        [
            {"": n, "seconds": t, "tokens/s": text / t, "padding": padding[n], "micro-batches": pieces[n]}
            | {name: float(first[n][name]) for name in ("loss", "grad_norm")}
            for n, t in times.items()
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
