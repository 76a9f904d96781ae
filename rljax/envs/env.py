"""The protocol of environments: pure functions that jit, vmap and scan."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """The result of one action. Nothing is reset: where the episode ended, `observation` is its last one."""

    observation: Any
    state: Any
    reward: Any
    terminated: Any  # bool: the episode ended; nothing follows
    truncated: Any  # bool: the episode was cut by its time limit; never together with `terminated`
    info: dict


class Box(NamedTuple):
    """Continuous actions: D numbers, each within its bounds."""

    low: tuple[float, ...]
    high: tuple[float, ...]


class Env(NamedTuple):
    """An environment; its parameters (sizes, rewards, positions) are in `params`, so that they can be traced."""

    reset: Callable  # (key, params) -> (observation, state)
    step: Callable  # (key, state, action, params) -> Step
    actions: int | Box  # the number of discrete actions, or the bounds of continuous ones
    params: Any
