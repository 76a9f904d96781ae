r"""One optimizer step of GRPO, PPO, DPO and SFT, and the same step by the trainers of peers, taking turns.

    python experiments/benchmarks/train_step.py                         # W1
    python experiments/benchmarks/train_step.py --preset W2 --algorithms grpo sft --micro_batches 4 8
    python experiments/benchmarks/train_step.py --against tunix trl     # against.py: makes their environments
    python experiments/benchmarks/train_step.py --algorithms grpo --profile trace    # for Perfetto or TensorBoard

W1 and W2 are those of rollout.py; an update learns from its prompts x completions. GRPO and PPO (a value head on the
policy's trunk) learn from sampled completions with random rewards, SFT from as many demonstrations of the same lengths,
the loss being that of the completions' tokens, DPO from half as many pairs. The log-probs of DPO's reference are
computed in every step, by us as by the peers; sampling, rewards and PPO's values are not part of these steps.

Fair: float32, plain AdamW, random weights, the same shapes, nothing is logged or saved, every update is waited for. The
peers run their own trainers with the settings that are fastest for them (peers/*_worker.py says which). First runs,
which compile, are left out; beside peers each turn begins with a run that is not timed.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.against import PEERS, UNTIMED, PeerName, Work, peer_works
from experiments.benchmarks.common import WORKLOADS, Output, Workload, alternately, prompts, run, trace, write_figures
from experiments.common.micro_batches import Pieces, cut
from experiments.common.settings import Batches
from rljax.algorithms import dpo, grpo, ppo, sft
from rljax.data.demonstrations import demonstrations
from rljax.models import decoder, policy
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table
from rljax.train.mesh import make_mesh
from rljax.train.objective import policy_objective
from rljax.train.shared_prefix import make_shared_prefix_annotate, make_shared_prefix_update
from rljax.train.update import make_update
from rljax.types import Objective, Pairs, Params, Sampling, TrainState, Trajectory

AlgorithmName = Literal["grpo", "ppo", "dpo", "sft"]
UNITS = {"grpo": "update", "dpo": "dpo", "sft": "sft"}  # what a peer does for it


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    preset: Literal["W1", "W2"] = "W1"  # the workload
    algorithms: tuple[AlgorithmName, ...] = ("grpo", "ppo", "dpo", "sft")  # whose step
    micro_batches: tuple[int, ...] = (0,)  # pieces of an update, each measured; 0: as recipes choose them from sizes
    repeats: int = 3  # timed runs of each
    against: tuple[PeerName, ...] = ()  # peers that take turns with ours


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    workload = WORKLOADS[cfg.preset]
    figures = {}
    for name in cfg.algorithms:
        numbers = [cut_as_recipes(name, workload, m).micro_batches for m in cfg.micro_batches]
        own = {f"{m} micro-batches": own_step(name, workload, m) for m in numbers}
        names = cfg.against if name in UNITS else ()
        with peer_works(names, UNITS.get(name), workload) as peers:
            times = alternately(own | peers, cfg.repeats, UNTIMED if peers else 0)
        figures |= report(f"{cfg.preset}, {name}", times)
        trace({f"{name}, {pieces}": work for pieces, work in own.items()}, cfg.profile)
    log_info(f"float32 on {jax.devices()[0].device_kind}, medians of {cfg.repeats}, taking turns")
    write_figures(cfg.json, figures)
    return figures


def report(title: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Print medians, best runs and the time of each peer over ours; return the medians and ratios by name."""
    titles = [peer.title for peer in PEERS.values() if peer.title in times]
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    lines = []
    figures = {}
    for name, seconds in median.items():
        ratios = {} if name in titles else {peer: median[peer] / seconds for peer in titles}
        figures[f"{title}, {name}, seconds"] = seconds
        figures |= {f"{title}, {peer} / {name}": ratio for peer, ratio in ratios.items()}
        columns = {f"{peer} / this": ratio for peer, ratio in ratios.items()}
        lines.append({"": name, "median, s": seconds, "best, s": min(times[name])} | columns)
    table(title, lines)
    return figures


# ------------------------------------------------------------------------------------------------------ our steps


def own_step(name: AlgorithmName, workload: Workload, micro_batches: int) -> Work:
    """work(i): one update through the functions that recipes use."""
    make = {"grpo": grpo_step, "ppo": ppo_step, "dpo": dpo_step, "sft": sft_step}[name]
    return make(workload, micro_batches)


def updating(
    name: AlgorithmName,
    objective: Objective,
    params: Params,
    workload: Workload,
    micro_batches: int,
    batch_of: Callable[[], object],
) -> Work:
    """work(i): the update from a batch that `batch_of` makes in each step, cut as recipes cut it."""
    optimizer = optax.adamw(1e-4)
    pieces = cut_as_recipes(name, workload, micro_batches)
    update = make_update(objective, optimizer, pieces.micro_batches)
    update = make_shared_prefix_update(update, workload.prompt_tokens - 1, pieces.group_size)
    state = TrainState(0, jax.tree.map(jnp.copy, params), optimizer.init(params), jax.random.key(1))

    def work(_):
        nonlocal state
        state, metrics = update(state, batch_of())
        return state.params, metrics

    return work


def cut_as_recipes(name: AlgorithmName, workload: Workload, micro_batches: int) -> Pieces:
    """In how many pieces an update of all rows is cut; `micro_batches` 0: chosen from sizes."""
    group_size = {"dpo": 2, "sft": 1}.get(name, workload.n)  # neighboring completions of one prompt
    batches = Batches(workload.rows // group_size, group_size, micro_batches=micro_batches)
    one = make_mesh(devices=jax.devices()[:1])
    return cut(workload.config, batches, workload.prompt_tokens, workload.completion_tokens, one)


def grpo_step(workload: Workload, micro_batches: int) -> Work:
    """Completions of one rollout, half of them rewarded at random."""
    params = policy.init(workload.config, jax.random.key(0))
    batch = grpo().credit(rewarded_rollout(workload, params), {})
    objective = policy_objective(policy.make_policy(workload.config), grpo())
    return updating("grpo", objective, params, workload, micro_batches, lambda: batch)


def ppo_step(workload: Workload, micro_batches: int) -> Work:
    """The same, with a value head on the policy's trunk."""
    params = policy.with_value_head(policy.init(workload.config, jax.random.key(0)), workload.config)
    model = policy.make_policy(workload.config)
    traj = rewarded_rollout(workload, params)
    annotated = policy.make_annotate(model, ppo().needs)(TrainState(0, params, None, jax.random.key(1)), traj)
    batch = ppo().credit(annotated, {})
    return updating("ppo", policy_objective(model, ppo()), params, workload, micro_batches, lambda: batch)


def sft_step(workload: Workload, micro_batches: int) -> Work:
    """Demonstrations as long as the rollout's rows."""
    params = policy.init(workload.config, jax.random.key(0))
    batch = sft().credit(random_demonstrations(workload, workload.rows), {})
    objective = policy_objective(policy.make_policy(workload.config), sft())
    return updating("sft", objective, params, workload, micro_batches, lambda: batch)


def dpo_step(workload: Workload, micro_batches: int) -> Work:
    """Half as many pairs as the rollout has rows, their reference log-probs computed in each step."""
    params = policy.init(workload.config, jax.random.key(0))
    model = policy.make_policy(workload.config)
    state = TrainState(0, params, None, jax.random.key(1), frozen={"reference": params})
    pieces = cut_as_recipes("dpo", workload, micro_batches)
    rows_at_once = workload.rows // pieces.micro_batches
    annotate = policy.make_annotate(model, ("ref_logp",))
    annotate = make_shared_prefix_annotate(annotate, workload.prompt_tokens - 1, 2, rows_at_once)
    chosen = random_demonstrations(workload, workload.rows // 2)
    rejected = random_demonstrations(workload, workload.rows // 2, seed=1)
    both = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]), chosen, rejected)

    def pairs() -> Pairs:
        annotated = annotate(state, both)
        chosen, rejected = (jax.tree.map(lambda x, i=i: x[i::2], annotated) for i in range(2))
        return Pairs(chosen=chosen, rejected=rejected)

    return updating("dpo", dpo(model), params, workload, micro_batches, pairs)


def rewarded_rollout(workload: Workload, params: Params) -> Trajectory:
    """Completions of the workload's prompts with random rewards of 0 or 1 on their last tokens."""
    rows = prompts(workload.config, workload.prompts, workload.prompt_tokens)
    sampling = Sampling(n=workload.n, max_tokens=workload.completion_tokens)
    traj = sample(decoder.language_model(workload.config), params, {}, rows, sampling, 0, 0)
    coins = np.random.default_rng(0).integers(0, 2, workload.rows)
    return traj.replace(rewards=jnp.zeros(traj.mask.shape).at[:, -1].set(jnp.asarray(coins, jnp.float32)))


def random_demonstrations(workload: Workload, count: int, seed: int = 0) -> Trajectory:
    """Random completions of random prompts."""
    rows = prompts(workload.config, count, workload.prompt_tokens)
    shape = (count, workload.completion_tokens)
    completions = np.random.default_rng(seed).integers(1, workload.config.vocab_size, shape)
    return demonstrations(rows, completions.tolist(), workload.completion_tokens)


if __name__ == "__main__":
    run(Config, main)
