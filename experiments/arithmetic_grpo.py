r"""A small language model learns to add by reinforcement, from scratch, on a laptop's CPU.

    python experiments/arithmetic_grpo.py                                # run it again and it resumes
    python experiments/arithmetic_grpo.py --algorithm gspo --seed 1      # any of ALGORITHMS below
    python experiments/arithmetic_grpo.py --reward shuffled              # a control: nothing to learn from

A character-level decoder of 0.8 M parameters is shown right sums until it is right about four times in ten
(arithmetic_sft.py). From then on it sees no answer any more, only whether its own completion was right: 0 or 1.

Reached: seeds 0 to 4, eval accuracy 0.380 0.371 0.423 0.435 0.375 -> 0.918 0.884 0.947 0.931 0.868 (median 0.918), in
149 to 211 s each, warm-up and compilation included, on 2 shared Xeon cores (commit ac89f43, jax 0.10.2).
--algorithm vpg, seeds 0 to 2: 0.380 0.371 0.423 -> 0.889 0.894 0.947; --algorithm trpo --steps 60: -> 0.528 0.492
0.603, every step accepted, its KL at most 0.01 nats a decision. A step takes 0.7 s and 3.4 s (median, seed 2; 2 shared
AMD EPYC cores, commits 5e872a6 (seed 0) and 85c14c7).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import arithmetic_sft
from experiments.common import arithmetic, command_line, train
from experiments.common.algorithms import critic_free
from experiments.common.optimizer import make_optimizer
from experiments.common.rewards import control_rewards
from experiments.common.sampling import make_draw, make_greedy_baseline
from experiments.common.settings import Batches, MeshShape, Optimizer, debug_batches
from rljax import algorithms as a
from rljax.models import policy
from rljax.rewards.score import make_score
from rljax.rewards.text import exact_text
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh, place
from rljax.train.metrics import require_on_policy, rollout_metrics
from rljax.train.objective import policy_objective
from rljax.train.run import Run
from rljax.train.trust_region import make_trust_region_update
from rljax.train.update import learn, make_update
from rljax.types import Algorithm, Params, TrainState

ALGORITHMS = critic_free(max_tokens=7)  # of the longest answer
ALGORITHMS |= {"ppo": a.ppo, "vpg": a.vpg, "trpo": a.trpo}
AlgorithmName = Literal[tuple(ALGORITHMS)]
PROGRESS_METRICS = ("reward", "eval_reward", "length", "kl_sequence", "tokens_per_second")


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of two-digit additions (or of sorting digits)."""

    seed: int = 0  # of everything: parameters, split, order, samples
    task: arithmetic.Problems = "additions"  # what to learn
    algorithm: AlgorithmName = "dapo"  # how to learn it
    reward: Literal["exact", "random", "shuffled"] = "exact"  # the last two are controls
    steps: int = 240  # steps of reinforcement: sample, score, update
    batches: Batches = Batches(prompts=64, num_generations=8, oversample=2)
    optimizer: Optimizer = Optimizer(learning_rate=8e-4, schedule="cosine")
    sft_target: float = 0.4  # accuracy on training problems at which the supervised warm-up stops
    sft_check_every: int = 10  # steps of the warm-up between measurements of that accuracy
    sft_directory: str = ""  # of the warm-up's run; default DIRECTORY/sft, or one that all runs of this seed share
    eval_prompts: int = 1024  # problems never trained on
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    directory: str = ""  # of the run; default runs/arithmetic_grpo/TASK-ALGORITHM-REWARD-seedSEED
    mesh: MeshShape = MeshShape()
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config, algorithm: Algorithm | None = None) -> dict[str, float]:
    """Warm up, then improve; returns eval accuracy before and after. `algorithm` replaces the one cfg names."""
    train.check_directory(cfg.directory, algorithm)
    own = algorithm
    algorithm = algorithm or ALGORITHMS[cfg.algorithm]()
    batches = debug_batches(cfg.batches, algorithm.least_group) if cfg.debug else cfg.batches
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_batches(batches, mesh)
    train.check_algorithm(algorithm, batches, "" if own else cfg.algorithm)
    algorithm = train.with_filtered_groups(algorithm, batches)
    run = make_run(cfg, algorithm)

    # -- model and data
    task, params = warmed_up(cfg)
    reference = {"reference": jax.tree.map(jnp.copy, params)}
    if "values" in algorithm.needs:
        params = policy.with_value_head(params, task.config)

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    key = jax.random.fold_in(jax.random.key(cfg.seed), 2)
    state = TrainState(0, params, optimizer.init(params), key, reference)
    shardings = train.shardings_of(mesh, state, optimizer, task.config)

    # -- the functions of a step
    score = make_score({"exact": exact_text}, task.tokenizer.decode)
    sampling = arithmetic.sampling_of(task, batches.num_generations)
    draw = make_draw(task.lm, task.train_prompts, batches, sampling, shardings, cfg.seed)
    fill_baseline = make_greedy_baseline(task.lm, algorithm, score, batches, sampling, shardings)
    sizes = (batches, shardings, task.config, task.train_prompts.length, task.max_tokens)
    annotate = train.cut_annotate(policy.make_annotate(task.policy, algorithm.needs), *sizes)
    keep = train.make_keep(algorithm, batches)  # all rows unless batches.oversample > 1
    credit = jax.jit(algorithm.credit)
    objective = policy_objective(task.policy, algorithm)
    make = partial(make_update, objective, optimizer)
    if cfg.algorithm == "trpo":
        make = partial(make_trust_region_update, objective, policy.make_divergence(task.config), fisher_every=4)
    make = partial(make, shardings=shardings)
    update = train.cut_update(make, *sizes)
    per_token = train.make_token_columns(task.policy, *sizes)
    evaluate = arithmetic.make_evaluate(task, 8 if cfg.debug else cfg.eval_prompts, cfg.seed)

    # -- the loop
    with run:
        arithmetic.save_model_files(task.tokenizer, task.config, run.directory / "model_files")
        state = place(state, shardings.state, donate=True)
        draw, score, update, evaluate = run.timed(sample=draw, score=score, update=update, eval=evaluate)
        before = train.before_training(run, evaluate, state)["eval_reward"]
        state = run.restore(state)
        for step in run.steps(state.step):
            traj, prompts, state = draw(state, step)
            traj = annotate(state, fill_baseline(state, traj, prompts))
            traj = control_rewards(score(traj, prompts), cfg.reward, jax.random.fold_in(state.key, 2))
            batch = credit(keep(traj), state.coefficients)
            state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches, at_old_policy=True)
            if run.is_first_step(step):
                require_on_policy(metrics)
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            metrics = rollout_metrics(traj, score.names) | metrics
            if train.is_due(cfg.eval_every, step, run.total_steps):
                metrics |= evaluate(state)
            if run.should_log_samples(step):
                run.log_samples(step, batch, task.tokenizer.decode, score.names, prompts, per_token(state, batch.traj))
            run.record(step, state, metrics)
        after = train.evaluate_at_end(run, evaluate, state)["eval_reward"]
        arithmetic.save_pretrained(task.config, state.params, run.directory)
    log_info(f"eval accuracy: {before:.3f} -> {after:.3f}")
    return {"before": before, "after": after}


def make_run(cfg: Config, algorithm: Algorithm) -> Run:
    """The run directory. It keeps the source of the algorithm."""
    name = f"{cfg.task}-{cfg.algorithm}-{cfg.reward}-seed{cfg.seed}" + "-debug" * cfg.debug
    return Run(
        cfg.directory or f"runs/arithmetic_grpo/{name}",
        asdict(cfg),
        steps=1 if cfg.debug else cfg.steps,
        source=__file__,
        functions={"algorithm": algorithm},
        save_every=cfg.save_every,
        progress_metrics=PROGRESS_METRICS,
    )


def warmed_up(cfg: Config) -> tuple[arithmetic.Task, Params]:
    """The task, and parameters that supervision has brought to the target: shared by all runs of one seed."""
    name = f"{cfg.task}-{cfg.sft_target}-{cfg.eval_prompts}-seed{cfg.seed}" + "-debug" * cfg.debug
    default = f"{cfg.directory}/sft" if cfg.directory else f"runs/arithmetic_sft/{name}"
    settings = arithmetic_sft.Config(
        seed=cfg.seed,
        task=cfg.task,
        target=cfg.sft_target,
        check_every=cfg.sft_check_every,
        eval_prompts=cfg.eval_prompts,
        directory=cfg.sft_directory or default,
        mesh=cfg.mesh,
        debug=cfg.debug,
    )
    return arithmetic_sft.train_supervised(settings)


if __name__ == "__main__":
    command_line.run(Config, main)
