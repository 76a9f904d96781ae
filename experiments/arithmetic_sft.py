r"""The supervised warm-up of arithmetic_grpo.py: a character-level decoder is shown right answers, and stopped early.

    python experiments/arithmetic_sft.py --target 0.9 --steps 2000       # or alone, and for longer

Problems to train on and held-out ones are made of different numbers.

Reached: as the first stage of arithmetic_grpo.py, seeds 0 to 4: 0.371 to 0.435 of the held-out additions right.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from rljax.rollouts.sampler import sample

import options
from options import MeshShape, Optimizer
from rljax.algorithms import sft
from rljax.data.demonstrations import demonstrations
from rljax.data.prompts import Prompts
from rljax.data.tasks import addition_problems, sorting_problems, train_eval_split_by_kind
from rljax.data.tokenizer import Tokenizer, character_tokenizer, save_characters
from rljax.models import decoder, hf, policy
from rljax.rewards.score import make_score
from rljax.rewards.text import exact_text
from rljax.train import mesh as meshes
from rljax.train.log import log_info, write_atomically
from rljax.train.objective import policy_objective
from rljax.train.run import Run
from rljax.train.update import make_update
from rljax.types import LM, Params, Rows, Sampling, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class Config:
    """Supervised learning of two-digit additions (or of sorting digits)."""

    seed: int = 0  # of everything: parameters, split, order, samples
    task: Literal["additions", "sortings"] = "additions"  # what to learn
    target: float = 0.4  # share of training problems answered rightly at which to stop
    check_every: int = 10  # steps between looks at that share
    steps: int = 400  # at which to stop at the latest
    batch: int = 128  # demonstrations per step
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warm_up=20)
    width: int = 128  # of the decoder
    layers: int = 4  # of the decoder
    held_out: int = 1024  # problems never trained on
    directory: str = "runs/arithmetic_sft/alone"  # of the run
    mesh: MeshShape = MeshShape()
    debug: bool = False  # no jit, NaN checks, one step


ALPHABET = "0123456789+="


class Task(NamedTuple):
    """Two sides of a set of problems that share none, and the model that is to learn them."""

    tokenizer: Tokenizer
    train: Prompts
    held_out: Prompts
    longest: int  # answer, its end included
    config: decoder.DecoderConfig
    lm: LM
    policy: Callable

    def answers(self, rows: Rows) -> list[list[int]]:
        return [[*self.tokenizer.encode(row["answer"]), self.tokenizer.stop[0]] for row in rows.columns]

    def sampling(self, n: int = 1, temperature: float = 1.0) -> Sampling:
        return Sampling(temperature, n=n, max_tokens=self.longest, stop=self.tokenizer.stop)

    def examine(self, params: Params, rows: Rows, seed: int) -> Trajectory:
        """One answer to each prompt, drawn at temperature 1 with keys that no training step uses, and judged."""
        drawn = sample(self.lm, params, {}, rows, self.sampling(), seed, -1)
        return make_score({"exact": exact_text}, self.tokenizer.decode)(drawn, rows)

    def copy_sidecar_files(self, directory: Path) -> None:
        """What export.py needs to know of the model."""
        save_characters(ALPHABET, directory)
        write_atomically(directory / "config.json", json.dumps(hf.to_hf_config(self.config, self.tokenizer.stop)))

    def accuracy(self, params: Params, rows: Rows, seed: int) -> float:
        """Share of the prompts answered rightly."""
        return float(np.mean(self.examine(params, rows, seed).scores))


def make_task(cfg: Config) -> Task:
    problems = {"additions": addition_problems, "sortings": sorting_problems}[cfg.task]()
    sides = train_eval_split_by_kind(problems, cfg.held_out, cfg.seed)
    tokenizer = character_tokenizer(ALPHABET)
    width = max(len(problem["prompt"]) for problem in problems)
    train, held_out = (Prompts(side, tokenizer.encode, lambda row: row["prompt"], width, cfg.seed) for side in sides)
    longest = 1 + max(len(problem["answer"]) for problem in problems)
    config = decoder.DecoderConfig(
        tokenizer.size, cfg.width, cfg.layers, 4, 4, cfg.width // 4, 11 * cfg.width // 4, max_positions=width + longest
    )
    lm, model = decoder.language_model(config), policy.make_policy(config)
    return Task(tokenizer, train, held_out, longest, config, lm, model)


def warm_up(cfg: Config, task: Task, params: Params) -> Params:
    """Maximum likelihood on demonstrations until the target is reached on problems of the training side."""
    mesh = meshes.make_mesh(**asdict(cfg.mesh))
    algorithm, optimizer = sft(), options.optimizer(cfg.optimizer, cfg.steps)
    state = TrainState(0, params, optimizer.init(params), jax.random.fold_in(jax.random.key(cfg.seed), 1))
    shardings = options.shardings_of(mesh, state, optimizer, task.config)
    update = make_update(policy_objective(task.policy, algorithm), optimizer, shardings=shardings)
    seen, steps = task.train.first(8 if cfg.debug else 512), 1 if cfg.debug else cfg.steps
    log_info(f"warm-up: supervised, until {cfg.target:.0%} of the training problems are right, at most {steps} steps")
    with Run(cfg.directory, asdict(cfg), steps=steps, source=__file__, progress_metrics=("loss", "accuracy")) as run:
        task.copy_sidecar_files(run.directory / "model")
        state = run.restore(jax.device_put(state, shardings.state))
        for step in run.steps(state.step):
            if step % cfg.check_every == 0:
                right = task.accuracy(state.params, seen, step)
                if right >= cfg.target:
                    break
            rows = task.train.draw(state.cursor, 8 if cfg.debug else cfg.batch)
            shown = demonstrations(rows, task.answers(rows), task.longest)
            state, metrics = update(state, algorithm.credit(shown, {}))
            state = state.replace(step=step + 1, cursor=rows.cursor)
            run.record(step, state, metrics | ({"accuracy": right} if step % cfg.check_every == 0 else {}))
        run.save(state)
    right = task.accuracy(state.params, seen, int(state.step))
    log_info(
        f"warm-up: right on {right:.0%} of the training problems after {int(state.step)} steps of supervised learning"
    )
    return state.params


def main(cfg: Config) -> None:
    task = make_task(cfg)
    params = warm_up(cfg, task, policy.init(task.config, jax.random.fold_in(jax.random.key(cfg.seed), 0)))
    log_info(f"held-out accuracy: {task.accuracy(params, task.held_out.first(cfg.held_out), cfg.seed):.3f}")


if __name__ == "__main__":
    options.run(Config, main)
