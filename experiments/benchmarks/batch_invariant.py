r"""What batch-invariant mode costs: one rollout and one gradient on work W1, with and without it, taking turns.

    python experiments/benchmarks/batch_invariant.py

W1 (`common.py`) with 8 prompts of 32 tokens x 8 completions of 64 tokens, float32.
"""

import dataclasses
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks.common import W1, Output, alternately, named, prompts, run, trace, write_figures
from rljax.models import decoder, policy
from rljax.models.decoder import DecoderConfig
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table
from rljax.types import Sampling


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Medians of each."""

    repeats: int = 5  # timed runs of each


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    plain = works("plain", W1)
    invariant = works("batch-invariant", dataclasses.replace(W1, batch_invariant=True))
    times = alternately(plain | invariant, cfg.repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    log_info(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {cfg.repeats}")
    lines = []
    for what in ("rollout", "gradient"):
        off = median[f"plain, {what}"]
        on = median[f"batch-invariant, {what}"]
        lines.append({"": what, "plain, s": off, "batch-invariant, s": on, "ratio": on / off})
    table("W1", lines)
    trace(plain | invariant, cfg.profile)
    figures = named(lines, "W1, ")
    write_figures(cfg.json, figures)
    return figures


def works(name: str, config: DecoderConfig) -> dict[str, Callable[[int], object]]:
    """The rollout of step i, and the gradient of the mean log-prob of its completions."""
    rows = prompts(config, 8, 32)
    lm = decoder.language_model(config, devices=1)
    model = policy.make_policy(config)
    params = policy.init(config, jax.random.key(0))
    sampling = Sampling(n=8, max_tokens=64)
    traj = sample(lm, params, {}, rows, sampling, 0, 0)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.where(traj.mask, model(params, {}, traj).logp, 0.0).sum() / traj.mask.sum()

    return {
        f"{name}, rollout": lambda i: sample(lm, params, {}, rows, sampling, 0, i),
        f"{name}, gradient": lambda _: gradient(params),
    }


if __name__ == "__main__":
    run(Config, main)
