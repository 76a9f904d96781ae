"""Environments of gymnasium (https://gymnasium.farama.org) that can be read and played in words: the `agents` extra."""

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.envs.text import TextEnv, TextStep


class GymnasiumEpisode:
    """An environment that is played. It is closed when nothing holds the episode any more: over, cut, or only begun."""

    def __init__(self, env: Any):
        self.env = env
        weakref.finalize(self, env.close)


def make_gymnasium(make: Callable[[], Any], name: str, instructions: str = "", actions: Sequence[str] = ()) -> TextEnv:
    """The environment that make() returns, as a TextEnv; every episode makes one of its own, and closes it.

    A turn is the action where actions are texts (`gymnasium.spaces.Text`), and holds its number or one of the names
    `actions` where they are numbered (`Discrete`): the last one in the turn counts. A turn without a legal action is no
    step; the model is told so. Observations are texts, or else what `render` draws in the mode "ansi", or numbers.

    instructions: what the prompt says before the first observation.
    Raises ImportError without gymnasium, ValueError for other spaces of actions.
    """
    try:
        from gymnasium import spaces
    except ImportError:
        raise ImportError("gymnasium is not installed: pip install 'rljax[agents]'") from None
    first = make()
    space = first.action_space
    first.close()
    if not isinstance(space, spaces.Text | spaces.Discrete):
        raise ValueError(f"{name}: actions are a {type(space).__name__}; legal: Text and Discrete")
    if actions and not (isinstance(space, spaces.Discrete) and len(actions) == space.n):
        raise ValueError(f"{name}: {len(actions)} names for actions that are {space}; legal: one for each number")

    is_text = isinstance(space, spaces.Text)
    legal = f"Answer one of: {', '.join(actions)}." if actions else f"That is no legal action: {space}."

    def reset(row: Mapping[str, Any], seed: int) -> tuple[GymnasiumEpisode, str]:
        episode = GymnasiumEpisode(make())
        observation, _ = episode.env.reset(seed=seed)
        return episode, "\n".join(filter(None, [instructions, show(episode.env, observation)]))

    def step(episode: GymnasiumEpisode, text: str) -> TextStep:
        action = text if is_text else _numbered_action(text, actions, int(space.start))
        if action is None or not space.contains(action):
            return TextStep(episode, legal, info={"illegal_moves": 1})
        observation, reward, terminated, truncated, _ = episode.env.step(action)
        cut = bool(truncated and not terminated)
        return TextStep(episode, show(episode.env, observation), float(reward), bool(terminated), cut)

    return TextEnv(name, reset, step)


def show(env: Any, observation: Any) -> str:
    """An observation in words. A place that a terminal would color stands in brackets."""
    if isinstance(observation, str):
        return observation
    if getattr(env, "render_mode", None) != "ansi":
        return str(observation)
    drawn = re.sub(r"\x1b\[[1-9][\d;]*m", "[", env.render())
    return re.sub(r"\x1b\[0?m", "]", drawn).strip("\n")


def _numbered_action(text: str, actions: Sequence[str], start: int) -> int | None:
    """The last name of an action in a turn, or where they have no names the last number."""
    if not actions:
        numbers = re.findall(r"-?\d{1,9}", text)
        return int(numbers[-1]) if numbers else None
    names = [name.lower() for name in actions]
    longest_first = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    found = re.findall(rf"\b(?:{longest_first})\b", text.lower())
    return start + names.index(found[-1]) if found else None
