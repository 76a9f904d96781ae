r"""Online DPO on the task of arithmetic_grpo.py, from the same warm-up: a prompt's best completion against its worst.

    python experiments/arithmetic_online_dpo.py                          # run it again and it resumes
    python experiments/arithmetic_online_dpo.py --task sortings --loss ipo

A completion is right or wrong, so a pair is a right one and a wrong one (arXiv:2402.04792); a prompt whose completions
are all right, or all wrong, makes no pair. The reference is the model after the warm-up. As many completions are
sampled in a step as arithmetic_grpo.py samples, and there are as many updates.

Reached: docs/results.md, where it stands beside the methods of arithmetic_grpo.py.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from experiments import arithmetic_grpo
from experiments.common import arithmetic, command_line, runs, train
from experiments.common.optimizer import make_optimizer
from experiments.common.preference_methods import PAIR_METHODS, PairLoss
from experiments.common.sampling import make_draw
from experiments.common.settings import Batches, MeshShape, Optimizer, debug_batches
from rljax.algorithms import online_pairs
from rljax.models import policy
from rljax.rewards.score import make_score
from rljax.rewards.text import exact_text
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh, place
from rljax.train.metrics import rollout_metrics
from rljax.train.run import Run
from rljax.train.update import learn, make_update
from rljax.types import TrainState

PROGRESS_METRICS = ("reward", "eval_reward", "accuracy", "margin", "kl_sequence")


@dataclass(frozen=True)
class Config:
    """Online preference optimization of two-digit additions (or of sorting digits)."""

    seed: int = 0  # of everything: parameters, split, order, samples
    task: arithmetic.Problems = "additions"  # what to learn
    loss: PairLoss = "sigmoid"  # of a pair: any that dpo.py has
    beta: float | None = None  # β of the loss; default: that of the method's paper
    steps: int = 240  # steps: sample, compare, update
    batches: Batches = Batches(prompts=128, num_generations=8)
    optimizer: Optimizer = Optimizer(learning_rate=8e-4, schedule="cosine")
    sft_target: float = 0.4  # accuracy on training problems at which the supervised warm-up stops
    sft_check_every: int = 10  # steps of the warm-up between measurements of that accuracy
    sft_directory: str = ""  # of the warm-up's run; default DIRECTORY/sft, or one that all runs of this seed share
    eval_prompts: int = 1024  # problems never trained on
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    directory: str = ""  # of the run; default runs/arithmetic_online_dpo/TASK-LOSS-seedSEED
    mesh: MeshShape = MeshShape()
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config) -> dict[str, float]:
    """Warm up, then improve; returns eval accuracy before and after."""
    batches = debug_batches(cfg.batches) if cfg.debug else cfg.batches
    pairs = replace(batches, num_generations=1)  # one a prompt
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_whole_groups(batches)
    train.check_batches(pairs, mesh)
    method = PAIR_METHODS[cfg.loss]
    run = make_run(cfg)

    # -- model and data
    task, params = arithmetic_grpo.warmed_up(cfg)
    reference = {"reference": jax.tree.map(jnp.copy, params)}

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * batches.epochs * batches.minibatches)
    key = jax.random.fold_in(jax.random.key(cfg.seed), 2)
    state = TrainState(0, params, optimizer.init(params), key, reference)
    shardings = train.shardings_of(mesh, state, optimizer, task.config)

    # -- the functions of a step
    make_pairs = jax.jit(partial(online_pairs, num_generations=batches.num_generations))
    score = make_score({"exact": exact_text}, task.tokenizer.decode)
    sampling = arithmetic.sampling_of(task, batches.num_generations)
    draw = make_draw(task.lm, task.train_prompts, batches, sampling, shardings, cfg.seed)
    annotate = policy.make_annotate(task.policy, ("ref_logp",))
    objective = method.make(task.policy, method.beta if cfg.beta is None else cfg.beta)
    make = partial(make_update, objective, optimizer, shardings=shardings)
    sizes = (task.train_prompts.length, 2 * task.max_tokens)  # a row of a batch holds both completions
    update = train.cut_update(make, pairs, shardings, task.config, *sizes)
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
            traj = score(annotate(state, traj), prompts)
            batch = make_pairs(traj)
            state, metrics = learn(update, state, batch, batches.epochs, batches.minibatches)
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            metrics = rollout_metrics(traj, score.names) | metrics
            if train.is_due(cfg.eval_every, step, run.total_steps):
                metrics |= evaluate(state)
            if run.should_log_samples(step):
                run.log_samples(step, runs.without_credit(traj), task.tokenizer.decode, score.names, prompts)
            run.record(step, state, metrics)
        after = train.evaluate_at_end(run, evaluate, state)["eval_reward"]
        arithmetic.save_pretrained(task.config, state.params, run.directory)
    log_info(f"eval accuracy: {before:.3f} -> {after:.3f}")
    return {"before": before, "after": after}


def make_run(cfg: Config) -> Run:
    """The run directory. It keeps the source of the objective."""
    name = f"{cfg.task}-{cfg.loss}-seed{cfg.seed}" + "-debug" * cfg.debug
    return Run(
        cfg.directory or f"runs/arithmetic_online_dpo/{name}",
        asdict(cfg),
        steps=1 if cfg.debug else cfg.steps,
        source=__file__,
        functions={"algorithm": PAIR_METHODS[cfg.loss].make},
        save_every=cfg.save_every,
        progress_metrics=PROGRESS_METRICS,
    )


if __name__ == "__main__":
    command_line.run(Config, main)
