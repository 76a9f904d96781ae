"""The protocol of environments: pure functions that jit, vmap and scan."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """What one action brought. `observation` is that of `state`: where the episode ended, the last one of it."""

    observation: Any
    state: Any
    reward: Any
    terminated: Any  # bool: nothing follows
    truncated: Any  # bool: something would follow, but time is up
    info: dict


class Env(NamedTuple):
    """An environment; its numbers (sizes, rewards, positions) are in `params`, so that they can be traced."""

    reset: Callable  # (key, params) -> (observation, state)
    step: Callable  # (key, state, action, params) -> Step
    actions: int
    params: Any
