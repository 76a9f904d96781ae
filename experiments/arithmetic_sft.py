r"""The supervised warm-up of arithmetic_grpo.py: a character-level decoder is shown right answers, and stopped early.

    python experiments/arithmetic_sft.py --target 0.9 --steps 2000       # or alone, and for longer

Training problems and eval problems are made of different numbers.

Reached: as the first stage of arithmetic_grpo.py, seeds 0 to 4: 0.371 to 0.435 of the eval additions right.
"""

import dataclasses
from dataclasses import asdict

import jax

from experiments.common import arithmetic, command_line, models, train
from experiments.common.optimizer import make_optimizer
from experiments.common.settings import MeshShape, Optimizer
from rljax.algorithms import sft
from rljax.data.demonstrations import demonstrations
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh, place
from rljax.train.objective import policy_objective
from rljax.train.run import Run
from rljax.train.update import make_update
from rljax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Supervised learning of two-digit additions (or of sorting digits)."""

    seed: int = 0  # of everything: parameters, split, order, samples
    task: arithmetic.Problems = "additions"  # what to learn
    target: float = 0.4  # accuracy on training problems at which to stop
    check_every: int = 10  # steps between measurements of that accuracy
    steps: int = 400  # steps after which to stop at the latest
    batch_size: int = 128  # demonstrations per step
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=20)
    width: int = 128  # width of the decoder
    layers: int = 4  # layers of the decoder
    eval_prompts: int = 1024  # problems never trained on
    directory: str = "runs/arithmetic_sft/alone"  # of the run
    mesh: MeshShape = MeshShape()
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config) -> None:
    """Train from random parameters, and print the accuracy on problems never trained on."""
    task, params = train_supervised(cfg)
    rows = task.eval_prompts.first(cfg.eval_prompts)
    log_info(f"eval accuracy: {arithmetic.accuracy(task, params, rows, cfg.seed):.3f}")


def train_supervised(cfg: Config) -> tuple[arithmetic.Task, Params]:
    """Maximum likelihood on right answers until the target accuracy is reached on training problems."""
    mesh = make_mesh(**cfg.mesh.sizes)
    batch_size = 8 if cfg.debug else cfg.batch_size
    steps = 1 if cfg.debug else cfg.steps

    # -- model and data
    task = arithmetic.make_task(cfg.task, cfg.eval_prompts, cfg.seed, cfg.width, cfg.layers, mesh)
    key = jax.random.key(cfg.seed)
    params = models.init_sharded(task.config, jax.random.fold_in(key, 0), mesh)
    checked = task.train_prompts.first(8 if cfg.debug else 512)

    # -- training state, and the functions of a step
    algorithm = sft()
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    state = TrainState(0, params, optimizer.init(params), jax.random.fold_in(key, 1))
    shardings = train.shardings_of(mesh, state, optimizer, task.config, show=cfg.mesh.show_sharding)
    update = make_update(policy_objective(task.policy, algorithm), optimizer, shardings=shardings)

    # -- the loop
    log_info(f"warm-up: supervised, until {cfg.target:.0%} of the training problems are right, at most {steps} steps")
    with Run(cfg.directory, asdict(cfg), steps=steps, source=__file__, progress_metrics=("loss", "accuracy")) as run:
        arithmetic.save_model_files(task.tokenizer, task.config, run.directory / "model_files")
        state = run.restore(place(state, shardings.state, donate=True))
        for step in run.steps(state.step):
            measured = {}
            if step % cfg.check_every == 0:
                measured["accuracy"] = arithmetic.accuracy(task, state.params, checked, step)
                if measured["accuracy"] >= cfg.target:
                    reached = measured["accuracy"]
                    break
            rows = task.train_prompts.draw(state.cursor, batch_size)
            traj = demonstrations(rows, arithmetic.answer_tokens(task, rows), task.max_tokens)
            state, metrics = update(state, algorithm.credit(traj, {}))
            state = state.replace(step=step + 1, cursor=rows.cursor)
            run.record(step, state, metrics | measured)
        else:
            reached = arithmetic.accuracy(task, state.params, checked, int(state.step))
        run.save(state)
        arithmetic.save_pretrained(task.config, state.params, run.directory)
    log_info(
        f"warm-up: right on {reached:.0%} of the training problems after {int(state.step)} steps of supervised learning"
    )
    return task, state.params


if __name__ == "__main__":
    command_line.run(Config, main)
