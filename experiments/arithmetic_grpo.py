r"""A small language model learns to add by reinforcement, from scratch, on a laptop's CPU.

    python experiments/arithmetic_grpo.py                                # run it again and it resumes
    python experiments/arithmetic_grpo.py --algorithm gspo --seed 1      # any of ALGORITHMS below
    python experiments/arithmetic_grpo.py --reward shuffled              # a control: nothing to learn from

A character-level decoder of 0.8 M parameters is shown right sums until it is right about four times in ten
(arithmetic_sft.py). From then on it sees no answer any more, only whether its own were right: 0 or 1.

Reached: seeds 0 to 4, held-out 0.380 0.371 0.423 0.435 0.375 -> 0.918 0.884 0.947 0.931 0.868 (median 0.918), in 149 to
211 s each, warm-up and compilation included, on 2 shared Xeon cores (commit ac89f43, jax 0.10.2).
--algorithm vpg, seeds 0 to 2: 0.380 0.371 0.423 -> 0.889 0.894 0.947; --algorithm trpo --steps 60: -> 0.528 0.492
0.603, every step accepted, its KL at most 0.01 nats a decision. A step takes 0.7 s and 3.4 s (median, seed 2; 2 shared
AMD EPYC cores, commits 5e872a6 (seed 0) and 85c14c7).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from rljax.rollouts.sampler import sample

import arithmetic_sft
import options
from options import Batches, MeshShape, Optimizer
from rljax import algorithms as a
from rljax.algorithms.dynamic_sampling import dynamic_sampling
from rljax.models import policy
from rljax.ops.shaping import at_last_decision
from rljax.rewards.score import make_score
from rljax.rewards.text import exact_text
from rljax.train import mesh as meshes
from rljax.train.log import log_info
from rljax.train.metrics import require_on_policy, reward_and_kl, rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.run import Run
from rljax.train.trust_region import make_trust_region_update
from rljax.train.update import learn, make_update
from rljax.types import Algorithm, Params, TrainState

BY_NAME = (a.grpo, a.dapo, a.gspo, a.cispo, a.sapo, a.gdpo, a.reinforce, a.rloo, a.remax, a.reinforce_pp, a.ppo)
BY_NAME += (a.vpg, a.trpo)
ALGORITHMS = {make.__name__: make for make in BY_NAME} | {"dr_grpo": partial(a.dr_grpo, 7.0)}  # 7: the longest answer
Named = Literal[tuple(ALGORITHMS)]
PROGRESS_METRICS = ("reward", "held_out", "length", "kl_sequence", "tokens_per_second")


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of two-digit additions (or of sorting digits)."""

    seed: int = 0  # of everything: parameters, split, order, samples
    task: Literal["additions", "sortings"] = "additions"  # what to learn
    algorithm: Named = "dapo"  # how to learn it
    reward: Literal["exact", "random", "shuffled"] = "exact"  # the last two are controls
    steps: int = 240  # of reinforcement
    batches: Batches = Batches(prompts=64, group=8, oversample=2, micro_batches=4)
    optimizer: Optimizer = Optimizer(learning_rate=8e-4, schedule="cosine")
    warm_up_target: float = 0.4  # share of training problems right at which supervision stops
    warm_up_check: int = 10  # steps of supervision between looks at that share
    held_out: int = 1024  # problems never trained on
    evaluate_every: int = 20  # steps
    save_every: int = 20  # steps between checkpoints
    directory: str = ""  # of the run; default runs/arithmetic_grpo/TASK-ALGORITHM-REWARD-seedSEED
    warm_up_directory: str = ""  # default DIRECTORY/warm_up, or one that all runs of this seed share
    mesh: MeshShape = MeshShape()
    debug: bool = False  # no jit, NaN checks, one step


def main(cfg: Config, algorithm: Algorithm | None = None) -> dict[str, float]:
    """Warm up, then improve; returns held-out accuracy before and after. `algorithm` replaces the one cfg names."""
    if algorithm is not None and not cfg.directory:
        raise ValueError("an algorithm of your own wants a directory of its own: Config(directory=...)")
    algorithm, b = algorithm or ALGORITHMS[cfg.algorithm](), options.small(cfg.batches) if cfg.debug else cfg.batches
    mesh = meshes.make_mesh(**asdict(cfg.mesh))
    options.check_batches(b, mesh)
    if cfg.algorithm == "trpo" and (b.epochs, b.minibatches) != (1, 1):
        raise ValueError(
            f"trpo steps once, on all rows: epochs x minibatches = {b.epochs} x {b.minibatches}; legal: 1 x 1"
        )
    name = f"{cfg.task}-{cfg.algorithm}-{cfg.reward}-seed{cfg.seed}" + "-debug" * cfg.debug
    place, settings = cfg.directory or f"runs/arithmetic_grpo/{name}", asdict(cfg)
    settings["code"], steps = options.fingerprint(algorithm), 1 if cfg.debug else cfg.steps
    run = Run(
        place, settings, steps=steps, source=__file__, save_every=cfg.save_every, progress_metrics=PROGRESS_METRICS
    )
    task, start = warm_up(cfg)
    reference = {"reference": jax.tree.map(jnp.copy, start)}
    start = policy.with_value_head(start, task.config) if "values" in algorithm.needs else start

    optimizer = options.optimizer(cfg.optimizer, cfg.steps * b.epochs * b.minibatches)
    state = TrainState(0, start, optimizer.init(start), jax.random.fold_in(jax.random.key(cfg.seed), 2), reference)
    shardings, columns = options.shardings_of(mesh, state, optimizer, task.config), task.train.length + task.longest - 1
    by_kl = partial(make_trust_region_update, divergence=policy.make_divergence(task.config), fisher_every=4)
    make = by_kl if cfg.algorithm == "trpo" else partial(make_update, optimizer=optimizer)
    make = partial(make, policy_objective(task.policy, algorithm))
    update = options.updater(make, b, shardings, columns)
    annotate, credit = policy.make_annotate(task.policy, algorithm.needs), jax.jit(algorithm.credit)
    with_reference = policy.make_annotate(task.policy, ("ref_logp",))
    keep = jax.jit(lambda traj: dynamic_sampling(traj, b.prompts * b.group))
    score = make_score({"exact": exact_text}, task.tokenizer.decode)
    log_ratio = jax.jit(lambda state, traj: task.policy(state.params, state.frozen, traj).logp - traj.logp)
    exam = task.held_out.first(8 if cfg.debug else cfg.held_out)

    def evaluate(state: TrainState) -> dict[str, float]:
        found = reward_and_kl(with_reference(state, task.examine(state.params, exam, cfg.seed)))
        return {"held_out": found["reward"], "kl_sequence": found["kl"]}

    with run:
        task.copy_sidecar_files(run.directory / "model")
        state = jax.device_put(state, shardings.state)
        before, state = evaluate(state)["held_out"], run.restore(state)
        for step in run.steps(state.step):
            rows = task.train.draw(state.cursor, b.prompts * b.oversample)
            placed = meshes.shard_prompts(shardings, rows)
            draw = partial(sample, task.lm, state.params, state.frozen, placed, seed=cfg.seed, step=step)
            traj = annotate(state, draw(task.sampling(b.group)))
            if "baseline" in algorithm.needs:  # the reward of the likeliest answer to each prompt
                greedy = score(draw(task.sampling(1, temperature=0.0)), rows)
                traj = traj.replace(baseline=jnp.repeat(jnp.sum(greedy.rewards, axis=1), b.group))
            traj = disturb(score(traj, rows), cfg.reward, jax.random.fold_in(state.key, 2))  # updates split off 0 and 1
            batch = credit(keep(traj), state.coefficients)
            state, metrics = learn(update, state, batch, b.epochs, b.minibatches)
            if run.is_first_step(step):
                require_on_policy(metrics)
            state = state.replace(step=step + 1, cursor=rows.cursor)
            seen = rollout_metrics(traj, score.names) | metrics
            seen |= evaluate(state) if (step + 1) % cfg.evaluate_every == 0 or step + 1 == cfg.steps else {}
            if run.should_log_samples(step):
                run.log_samples(step, batch, task.tokenizer.decode, score.names, rows, log_ratio(state, batch.traj))
            run.record(step, state, seen)
        after = evaluate(state)["held_out"]
    log_info(f"held-out accuracy: {before:.3f} -> {after:.3f}")
    return {"before": before, "after": after}


def warm_up(cfg: Config) -> tuple[arithmetic_sft.Task, Params]:
    """The task, and parameters that supervision has brought to the target: shared by all runs of one seed."""
    name = f"{cfg.task}-{cfg.warm_up_target}-{cfg.held_out}-seed{cfg.seed}" + "-debug" * cfg.debug
    place = cfg.warm_up_directory or (f"{cfg.directory}/warm_up" if cfg.directory else f"runs/arithmetic_sft/{name}")
    shared = {field: getattr(cfg, field) for field in ("seed", "task", "held_out", "mesh", "debug")}
    taught = arithmetic_sft.Config(target=cfg.warm_up_target, check_every=cfg.warm_up_check, directory=place, **shared)
    task, key = arithmetic_sft.make_task(taught), jax.random.fold_in(jax.random.key(cfg.seed), 0)
    return task, arithmetic_sft.warm_up(taught, task, policy.init(task.config, key))


def disturb(traj, reward: str, key):
    """The controls: rewards that know nothing of the answers. `shuffled` gives each row the reward of another row."""
    if reward == "exact":
        return traj
    total = jnp.sum(traj.rewards, axis=1)
    coins = jax.random.bernoulli(key, 0.3, total.shape).astype(total.dtype)
    other = coins if reward == "random" else jax.random.permutation(key, total)
    return traj.replace(rewards=at_last_decision(other, traj.mask), scores=other[:, None])


if __name__ == "__main__":
    options.run(Config, main)
