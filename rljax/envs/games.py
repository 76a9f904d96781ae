"""Games in words: a maze that is described step by step, and a number to be guessed."""

import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rljax.envs.env import Env
from rljax.envs.maze import State
from rljax.envs.text import TextEnv, TextStep

DIRECTIONS = ("up", "down", "left", "right")  # the actions of `rljax.envs.maze.MOVES`


# ---------------------------------------------------------------------------------------------------------------- maze


class SpokenMaze(NamedTuple):
    """An episode in a maze."""

    state: State
    key: jax.Array


def spoken_maze(maze: Env) -> TextEnv:
    """A maze of `rljax.envs.maze` in words: rewards, slips, ends and time limit are its own.

    The model is told where it is, and answers with one of up, down, left and right: the last of these words in its turn
    counts. A turn without one is no step; the model is told so.
    """
    reset_maze, step_maze = jax.jit(maze.reset), jax.jit(maze.step)
    ends = [tuple(cell) for cell in np.argwhere(np.asarray(maze.params.ends)).tolist()]
    values = {cell: float(maze.params.rewards[cell]) for cell in ends}

    def reset(row: Mapping[str, Any], seed: int) -> tuple[SpokenMaze, str]:
        start_key, key = jax.random.split(jax.random.key(seed))
        _, state = reset_maze(start_key, maze.params)
        rows, columns = maze.params.walls.shape
        marks = "".join(
            f" Row {cell[0] + 1}, column {cell[1] + 1} ends the game with {value:+g}." for cell, value in values.items()
        )
        rules = f"You are in a maze of {rows} rows and {columns} columns.{marks} Answer up, down, left or right."
        return SpokenMaze(state, key), f"{rules}\n{describe(state)}"

    def describe(state: State) -> str:
        row, column = np.asarray(state.position).tolist()
        return f"You are in row {row + 1}, column {column + 1}."

    def step(game: SpokenMaze, text: str) -> TextStep:
        words = re.findall(rf"\b(?:{'|'.join(DIRECTIONS)})\b", text.lower())
        if not words:
            return TextStep(game, "Answer up, down, left or right.", info={"illegal_moves": 1})
        step_key, key = jax.random.split(game.key)
        done = step_maze(step_key, game.state, DIRECTIONS.index(words[-1]), maze.params)
        return TextStep(
            SpokenMaze(done.state, key),
            describe(done.state),
            float(done.reward),
            bool(done.terminated),
            bool(done.truncated),
        )

    return TextEnv("maze", reset, step)


# ------------------------------------------------------------------------------------------------------ guess a number


class Guessing(NamedTuple):
    """A number that is to be guessed, and how many guesses are left."""

    secret: int
    left: int


def guessing_game(low: int = 1, high: int = 100, guesses: int = 7) -> TextEnv:
    """Find a number with the hints "higher" and "lower": reward 1 for finding it, and the game ends after `guesses`.

    The number is drawn from the seed, or is the row's column `secret`. The first whole number in a turn counts; a turn
    without one is a guess too.
    """
    if not (low <= high and guesses >= 1):
        raise ValueError(f"a number from {low} to {high} in {guesses} guesses; legal: low <= high, at least 1 guess")

    def reset(row: Mapping[str, Any], seed: int) -> tuple[Guessing, str]:
        secret = int(row.get("secret", random.Random(seed).randint(low, high)))
        return Guessing(secret, guesses), f"Guess a whole number from {low} to {high}. You have {guesses} guesses."

    def step(game: Guessing, text: str) -> TextStep:
        game = game._replace(left=game.left - 1)
        found = re.search(r"-?\d{1,18}", text)
        if found and int(found[0]) == game.secret:
            return TextStep(game, "Right.", 1.0, terminated=True)
        if found is None:
            hint, info = "That is no whole number.", {"illegal_moves": 1}
        else:
            hint, info = ("Higher." if int(found[0]) < game.secret else "Lower."), {}
        return TextStep(game, hint, 0.0, terminated=game.left == 0, info=info)

    return TextEnv("guess", reset, step)
