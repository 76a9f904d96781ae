r"""A whole GRPO step as experiments/grpo.py runs it, and the same step by the trainers of peers, taking turns.

    python experiments/benchmarks/grpo_step.py                          # W1
    python experiments/benchmarks/grpo_step.py --preset W2 --micro_batches 4 8 --json grpo_step.json
    python experiments/benchmarks/grpo_step.py --against tunix trl      # against.py: makes their environments

A step: draw prompts, sample completions, decode them to text, score the text in a worker process, advantages, one
update, metrics on the host. W1 and W2 are those of rollout.py. There is no KL term, so the reference's log-probs
are not computed; nothing is written to disk.

Fair: float32, plain AdamW, one update a rollout, random weights, the same shapes. Peers run their trainers' own loops
with the settings that are fastest for them (peers/*_worker.py says which); their reward functions run in the trainer's
process. First runs, which compile, are left out; beside peers each turn begins with a run that is not timed.
"""

import dataclasses
import statistics
import time
from collections import defaultdict
from functools import partial
from typing import Literal

import jax
import numpy as np
import optax

from experiments.benchmarks.against import UNTIMED, PeerName, Work, peer_works
from experiments.benchmarks.common import WORKLOADS, Output, Workload, alternately, run, trace, write_figures
from experiments.benchmarks.train_step import report
from experiments.common import train
from experiments.common.micro_batches import cut
from experiments.common.sampling import make_draw
from experiments.common.settings import Batches
from rljax.algorithms import grpo
from rljax.data.prompts import Prompts
from rljax.models import decoder, policy
from rljax.rewards.pool import Pool
from rljax.rewards.score import Score, make_score
from rljax.train.log import log_info, table
from rljax.train.mesh import make_mesh
from rljax.train.metrics import rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.update import learn, make_update
from rljax.types import Sampling, TrainState

PROMPTS = 256  # in the dataset


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    preset: Literal["W1", "W2"] = "W1"  # the workload
    micro_batches: tuple[int, ...] = (0,)  # pieces of an update, each measured; 0: as recipes choose them from sizes
    repeats: int = 3  # timed steps of each
    against: tuple[PeerName, ...] = ()  # peers that take turns with ours


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    workload = WORKLOADS[cfg.preset]
    parts = {}
    own = {}
    with Pool(workers=1) as pool, peer_works(cfg.against, "grpo_step", workload) as peers:
        score = make_score({"even": ends_even}, decode, pool=pool)
        for asked in cfg.micro_batches:
            micro_batches = micro_batches_of(workload, asked)
            name = f"{micro_batches} micro-batches"
            parts[name] = defaultdict(list)
            own[name] = own_step(workload, micro_batches, score, parts[name])
        untimed = UNTIMED if peers else 0
        times = alternately(own | peers, cfg.repeats, untimed)
        figures = report(f"{cfg.preset}, GRPO step", times) | report_parts(cfg.preset, parts, untimed)
        trace(own, cfg.profile)
    log_info(f"float32 on {jax.devices()[0].device_kind}, medians of {cfg.repeats}, taking turns")
    write_figures(cfg.json, figures)
    return figures


def report_parts(preset: str, parts: dict[str, dict[str, list[float]]], untimed: int) -> dict[str, float]:
    """Print and return the median seconds of each part of our step: the last of each turn, without the first turn."""
    lines = []
    figures = {}
    for name, seconds in parts.items():
        medians = {part: statistics.median(values[untimed :: untimed + 1][1:]) for part, values in seconds.items()}
        figures |= {f"{preset}, GRPO step, {name}, {part}, seconds": value for part, value in medians.items()}
        lines.append({"": name, **medians})
    table(f"{preset}, seconds of the parts", lines)
    return figures


def batches_of(workload: Workload, micro_batches: int) -> Batches:
    return Batches(prompts=workload.prompts, num_generations=workload.n, micro_batches=micro_batches)


def micro_batches_of(workload: Workload, asked: int) -> int:
    """In how many pieces `own_step` cuts its update; `asked` 0: chosen from sizes."""
    sizes = (workload.prompt_tokens, workload.completion_tokens)
    return cut(workload.config, batches_of(workload, asked), *sizes, make_mesh()).micro_batches


def own_step(workload: Workload, micro_batches: int, score: Score, seconds: dict[str, list[float]]) -> Work:
    """work(i): the step of experiments/grpo.py without a reference; the seconds of its parts go into `seconds`."""
    config = workload.config
    algorithm = grpo()
    optimizer = optax.adamw(1e-4)
    params = policy.init(config, jax.random.key(0))
    state = TrainState(0, params, optimizer.init(params), jax.random.key(1))
    shardings = train.shardings_of(make_mesh(), state, optimizer, config)
    state = jax.device_put(state, shardings.state)

    batches = batches_of(workload, micro_batches)
    sizes = (config, workload.prompt_tokens, workload.completion_tokens)
    sampling = Sampling(n=workload.n, max_tokens=workload.completion_tokens)
    draw = make_draw(decoder.language_model(config), random_prompts(workload), batches, sampling, shardings, seed=0)
    keep = train.make_keep(algorithm, batches)
    credit = jax.jit(algorithm.credit)
    objective = policy_objective(policy.make_policy(config), algorithm)
    make = partial(make_update, objective, optimizer, shardings=shardings)
    update = train.cut_update(make, batches, shardings, *sizes)

    def step(i: int) -> dict:
        nonlocal state
        start = time.perf_counter()
        traj, prompts, state = draw(state, i)
        jax.block_until_ready(traj)
        sampled = time.perf_counter()
        traj = score(traj, prompts)
        scored = time.perf_counter()
        batch = credit(keep(traj), state.coefficients)
        state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches, at_old_policy=True)
        state = state.replace(step=i + 1, cursor=prompts.cursor)
        metrics = jax.device_get(rollout_metrics(traj, score.names) | metrics)
        ended = time.perf_counter()
        seconds["rollout"].append(sampled - start)
        seconds["rewards"].append(scored - sampled)
        seconds["advantages, update, metrics"].append(ended - scored)
        return metrics

    return step


def random_prompts(workload: Workload) -> Prompts:
    """Prompts of random numbers, which are their tokens."""
    shape = (PROMPTS, workload.prompt_tokens)
    tokens = np.random.default_rng(0).integers(1, workload.config.vocab_size, shape)
    rows = [{"prompt": decode(ids)} for ids in tokens.tolist()]
    return Prompts(rows, tokens.tolist(), workload.prompt_tokens)


def encode(text: str) -> list[int]:
    """Numbers in a text."""
    return [int(word) for word in text.split()]


def decode(tokens: list[int]) -> str:
    """The numbers as a text."""
    return " ".join(map(str, tokens))


def ends_even(completion: str) -> float:
    """1 if the last number is even."""
    return float(encode(completion)[-1] % 2 == 0)


if __name__ == "__main__":
    run(Config, main)
