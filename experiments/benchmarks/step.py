r"""One GRPO step on work W1, against what the machine can do in the same process.

    python experiments/benchmarks/step.py

W1: vocabulary 4096, width 256, 4 layers, 8 heads (4 for keys) of 32, MLP 688, tied, float32; 8 prompts of 32 tokens x 8
answers of 64 tokens. Peak: the better of two float32 matmuls. FLOPs are those of the matmuls with parameters, 2 a token
and parameter forward and 4 backward; attention is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import W1, peak, prompts, seconds
from rljax.rollouts.sampler import sample

from rljax.algorithms import grpo
from rljax.models import decoder, policy
from rljax.train.log import log_info, table
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import Sampling, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Medians of one rollout and one update."""

    repeats: int = 5  # timed runs of each
    micro_batches: int = 4  # of the update


def main(cfg: Config) -> None:
    rng, rows = np.random.default_rng(0), prompts(W1, 8, 32)
    lm, model, params = decoder.language_model(W1), policy.make_policy(W1), policy.init(W1, jax.random.key(0))
    sampling = Sampling(n=8, max_tokens=64)
    traj = sample(lm, params, {}, rows, sampling, 0, 0)
    rewards = jnp.zeros(traj.mask.shape).at[:, -1].set(jnp.asarray(rng.integers(0, 2, 64), jnp.float32))
    batch = grpo().credit(traj.replace(rewards=rewards), {})
    optimizer = optax.adamw(1e-4)
    state = [TrainState(0, jax.tree.map(jnp.copy, params), optimizer.init(params), jax.random.key(1))]
    update = make_update(policy_objective(model, grpo()), optimizer, cfg.micro_batches)

    def learn(_):
        state[0], metrics = update(state[0], batch)
        return metrics

    ceiling = peak(cfg.repeats)
    rollout = seconds(lambda i: sample(lm, params, {}, rows, sampling, 0, i), cfg.repeats)
    learning = seconds(learn, cfg.repeats)
    weights = sum(x.size for x in jax.tree.leaves(params))
    tokens = traj.mask.size
    log_info(
        f"float32 peak: {ceiling / 1e9:.0f} GFLOP/s on {jax.devices()[0].device_kind}, {weights / 1e6:.2f} M parameters"
    )
    flops = {"rollout": 2 * weights * (8 * 32 + 64 * 64), "update": 6 * weights * tokens}
    rates = {"rollout": int(traj.mask.sum()) / rollout, "update": tokens / learning}
    timed = {"rollout": rollout, "update": learning}
    table(
        "W1",
        [
            {"": name, "seconds": t, "tokens/s": rates[name], "share of peak": flops[name] / t / ceiling}
            for name, t in timed.items()
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
