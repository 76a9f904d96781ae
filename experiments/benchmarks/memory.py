r"""Compiled temporary memory of one GRPO update as the vocabulary grows.

    python experiments/benchmarks/memory.py

Work W1 (benchmarks/common.py) but for the vocabulary: 64 rows of 96 tokens. Compared with 4·B·T·ΔV bytes, what float32
logits of all tokens would add: peers hold one or several such arrays. What grows here is the gradient of the table of
embeddings, V·D floats each: the sum over micro-batches, over chunks, and a chunk's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import tyro
from common import W1

from rljax.algorithms import grpo
from rljax.models import policy
from rljax.train.log import table
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import Batch, TrainState, trajectory_of_tokens

B, T = 64, 96


@dataclasses.dataclass(frozen=True)
class Config:
    """Which sizes to compile."""

    vocabularies: tuple[int, int] = (4096, 32768)  # the smaller and the larger
    micro_batches: tuple[int, ...] = (1, 4, 8)  # pieces of the update


def temporary_bytes(vocab_size: int, micro_batches: int) -> int:
    """Of the compiled update, beside its arguments and results."""
    config = dataclasses.replace(W1, vocab_size=vocab_size)
    optimizer = optax.adamw(1e-3)

    def arguments():
        params = policy.init(config, jax.random.key(0))
        tokens = jnp.zeros((B, T + 1), jnp.int32)
        ones = jnp.ones_like(tokens, jnp.float32)
        traj = trajectory_of_tokens(tokens, tokens + 1, ones > 0, ones, temperature=ones)
        batch = Batch(traj, advantages=ones[:, 1:], mask=traj.mask)
        return TrainState(None, params, optimizer.init(params), jax.random.key(0), None, None), {}, batch

    update = make_update(policy_objective(policy.make_policy(config), grpo()), optimizer, micro_batches)
    compiled = update.jitted.lower(*jax.eval_shape(arguments)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main(cfg: Config) -> list[dict]:
    small, large = cfg.vocabularies
    all_logits, rows = 4 * B * T * (large - small), []
    for pieces in cfg.micro_batches:
        first, second = (temporary_bytes(v, pieces) for v in (small, large))
        row = {"micro-batches": pieces, f"V = {small}, MB": first / 1e6, f"V = {large}, MB": second / 1e6}
        rows.append(row | {"growth, MB": (second - first) / 1e6, "of 4·B·T·ΔV": (second - first) / all_logits})
    shown = [
        {k: v if isinstance(v, int) else f"{v:.1%}" if "of" in k else f"{v:.0f}" for k, v in r.items()} for r in rows
    ]
    table(f"temporary memory of an update; 4·B·T·ΔV = {all_logits / 1e6:.0f} MB", shown)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config))
