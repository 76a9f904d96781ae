"""Prompts left out of a step by their running pass rate, and a curriculum from easy ones to all."""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from experiments.common.settings import PromptData
from rljax.data.difficulty import PassRates, initial_pass_rates, is_left_out, update_pass_rates
from rljax.data.prompts import Prompts
from rljax.ops.returns import correct_episodes
from rljax.train import distributed
from rljax.types import PromptBatch, TrainState, Trajectory


def is_filtered(settings: PromptData) -> bool:
    """Whether any prompt may be left out."""
    return settings.min_pass_rate > 0 or settings.max_pass_rate < 1 or settings.curriculum_steps > 0


def initial_rates(settings: PromptData, prompts: Prompts, carry_over: int) -> dict[str, np.ndarray] | None:
    """`TrainState.extra` before the first step: the pass rates. None where no prompt is left out.

    Raises ValueError for a window that no rate can be in, and together with `carry_over`.
    """
    if not 0 <= settings.min_pass_rate <= settings.max_pass_rate <= 1 or settings.curriculum_steps < 0:
        raise ValueError(
            f"data.min_pass_rate = {settings.min_pass_rate}, max_pass_rate = {settings.max_pass_rate}, "
            f"curriculum_steps = {settings.curriculum_steps}; legal: 0 <= min <= max <= 1, and steps from 0 on"
        )
    if not is_filtered(settings):
        return None
    if carry_over:
        raise ValueError(
            f"carry_over = {carry_over} and prompts left out by their pass rate: a completion that is carried over "
            "has no score yet; legal: one of both"
        )
    return initial_pass_rates(len(prompts))._asdict()


def lowest_rate(settings: PromptData, step: int) -> float:
    """The least pass rate of a prompt at this step: with a curriculum it falls to min_pass_rate, linearly.

    It begins at 1/2, or in the middle from min_pass_rate to max_pass_rate where that is lower.
    """
    if step >= settings.curriculum_steps:
        return settings.min_pass_rate
    middle = (settings.min_pass_rate + settings.max_pass_rate) / 2
    start = max(min(0.5, middle), settings.min_pass_rate)
    return start + (settings.min_pass_rate - start) * step / settings.curriculum_steps


def make_next_prompts(settings: PromptData, prompts: Prompts) -> Callable[[TrainState, int, int], PromptBatch]:
    """next_prompts(state, step, count): from the state's cursor on, without those that are left out."""
    if not is_filtered(settings):
        return lambda state, step, count: prompts.draw(state.cursor, count)

    def next_prompts(state: TrainState, step: int, count: int) -> PromptBatch:
        window = {"lowest": lowest_rate(settings, step), "highest": settings.max_pass_rate}
        rates = PassRates(**{name: np.asarray(value) for name, value in state.extra.items()})
        return prompts.draw_unless(
            state.cursor, count, partial(is_left_out, rates, skip_epochs=settings.skip_epochs, **window)
        )

    return next_prompts


def after_scores(
    settings: PromptData, state: TrainState, traj: Trajectory, rows: PromptBatch, prompts: Prompts
) -> tuple[TrainState, dict[str, float]]:
    """The state with the pass rates of the prompts just scored, and how many draws were left out for them.

    A completion passes where it is correct: its first score is above 0 (`rljax.ops.returns.correct_episodes`).
    """
    if not is_filtered(settings):
        return state, {}
    verdicts = distributed.fetch(jax.jit(correct_episodes)(traj.rewards, traj.mask, traj.scores))
    correct, judged = (x.reshape(len(rows.number), -1) for x in verdicts)
    passed = np.where(judged.any(axis=1), correct.sum(axis=1) / np.maximum(judged.sum(axis=1), 1), np.nan)
    indices = prompts.indices_of(rows.number)
    rates = PassRates(**{name: np.asarray(value) for name, value in state.extra.items()})
    rates = update_pass_rates(rates, indices, rows.number // len(prompts), passed)
    left_out = rows.cursor - int(state.cursor) - len(rows.number)
    known = rates.rate[rates.epoch >= 0]
    pass_rate = float(known.mean()) if len(known) else math.nan
    metrics = {"prompts_left_out": float(left_out), "pass_rate": pass_rate}
    return state.replace(extra=rates._asdict()), metrics
