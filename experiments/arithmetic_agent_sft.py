r"""The supervised warm-up of arithmetic_agent_grpo.py: a character-level decoder is shown right answers to products.

    python experiments/arithmetic_agent_sft.py --target 0.9 --tool_share 1     # or alone, and for longer

Half of the demonstrations call the calculator, half give the answer at once, which the decoder cannot learn in this
time: it learns how a call is written and that what comes back is the answer, but not that calling is worth it.

Reached: as the first stage of arithmetic_agent_grpo.py, seeds 0 1 2: an eval reward of 0.407 0.394 0.463, with 0.61
0.54 0.66 calls a conversation, after 80 100 100 steps.
"""

import dataclasses
from dataclasses import asdict

import jax
import numpy as np

from experiments.common import arithmetic, command_line, models, tool_arithmetic, train
from experiments.common.optimizer import make_optimizer
from experiments.common.settings import MeshShape, Optimizer
from experiments.common.tool_arithmetic import ToolTask
from rljax.algorithms import sft
from rljax.data.demonstrations import collate
from rljax.models import policy
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh, place
from rljax.train.objective import policy_objective
from rljax.train.run import Run
from rljax.train.update import make_update
from rljax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Supervised learning of products, with a calculator and without."""

    seed: int = 0  # of everything: parameters, split, order, samples
    target: float = 0.3  # reward on training problems at which to stop
    tool_share: float = 0.5  # share of the demonstrations that call the calculator
    check_every: int = 20  # steps between measurements of that reward
    steps: int = 1000  # steps after which to stop at the latest
    batch_size: int = 128  # demonstrations per step
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=20)
    width: int = 128  # width of the decoder
    layers: int = 2  # layers of the decoder
    eval_prompts: int = 1024  # problems never trained on
    directory: str = "runs/arithmetic_agent_sft/alone"  # of the run
    mesh: MeshShape = MeshShape()
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config) -> None:
    """Train from random parameters, and print the reward on problems never trained on."""
    task, params = train_supervised(cfg)
    reward = tool_arithmetic.mean_reward(task, params, task.eval_prompts.first(cfg.eval_prompts), cfg.seed)
    log_info(f"eval reward: {reward['reward']:.3f} ± {reward['error']:.3f}")


def train_supervised(cfg: Config) -> tuple[ToolTask, Params]:
    """Maximum likelihood on right answers until the target reward is reached on training problems."""
    mesh = make_mesh(**cfg.mesh.sizes)
    batch_size = 8 if cfg.debug else cfg.batch_size
    steps = 1 if cfg.debug else cfg.steps

    # -- model and data
    task = tool_arithmetic.make_tool_task(cfg.eval_prompts, cfg.seed, cfg.width, cfg.layers, mesh)
    key = jax.random.key(cfg.seed)
    params = models.init_sharded(task.config, jax.random.fold_in(key, 0), mesh)
    checked = task.train_prompts.first(8 if cfg.debug else 256)

    # -- training state, and the functions of a step
    algorithm = sft()
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    state = TrainState(0, params, optimizer.init(params), jax.random.fold_in(key, 1))
    shardings = train.shardings_of(mesh, state, optimizer, task.config, show=cfg.mesh.show_sharding)
    update = make_update(policy_objective(policy.make_policy(task.config), algorithm), optimizer, shardings=shardings)

    # -- the loop
    log_info(f"warm-up: supervised, until the reward on training problems is {cfg.target}, at most {steps} steps")
    with Run(cfg.directory, asdict(cfg), steps=steps, source=__file__, progress_metrics=("loss", "reward")) as run:
        arithmetic.save_model_files(
            task.tokenizer, task.config, run.directory / "model_files", tool_arithmetic.ALPHABET
        )
        state = run.restore(place(state, shardings.state, donate=True))
        for step in run.steps(state.step):
            measured = {}
            if step % cfg.check_every == 0:
                measured["reward"] = tool_arithmetic.mean_reward(task, state.params, checked, step)["reward"]
                if measured["reward"] >= cfg.target:
                    break
            rows = task.train_prompts.draw(state.cursor, batch_size)
            with_tool = np.random.default_rng([cfg.seed, step]).random(batch_size) < cfg.tool_share
            examples = tool_arithmetic.demonstrations_of_tools(task, rows.columns, with_tool)
            state, metrics = update(state, algorithm.credit(collate(examples, tool_arithmetic.MAX_CONTEXT), {}))
            state = state.replace(step=step + 1, cursor=rows.cursor)
            run.record(step, state, metrics | measured)
        run.save(state)
        arithmetic.save_pretrained(task.config, state.params, run.directory)
    log_info(f"warm-up: {int(state.step)} steps of supervised learning")
    return task, state.params


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
