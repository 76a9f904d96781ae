"""Catch (bsuite): a ball falls down a board; move the paddle in the bottom row under it. +1 caught, -1 missed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step


class State(NamedTuple):
    ball: jax.Array  # row, column
    paddle: jax.Array  # column


def make_catch(rows: int = 10, columns: int = 5) -> Env:
    """Catch as an Env that observes the board as [rows · columns] zeros and ones. Actions: left, stay, right.

    An episode has rows - 1 steps; only the last one is rewarded, and it terminates.
    """

    def observe(state: State):
        paddle = jnp.stack([jnp.int32(rows - 1), state.paddle])
        cells = jnp.stack([state.ball, paddle]) @ jnp.array([columns, 1])
        return jax.nn.one_hot(cells, rows * columns).max(axis=0)

    def reset(key, params):
        column = jax.random.randint(key, (), 0, columns)
        state = State(jnp.stack([jnp.int32(0), column]), jnp.int32(columns // 2))
        return observe(state), state

    def step(key, state: State, action, params) -> Step:
        paddle = jnp.clip(state.paddle + action - 1, 0, columns - 1)
        new = State(state.ball + jnp.array([1, 0]), paddle)
        landed = new.ball[0] == rows - 1
        caught = new.ball[1] == paddle
        reward = jnp.where(landed, jnp.where(caught, 1.0, -1.0), 0.0)
        return Step(observe(new), new, reward, landed, jnp.bool_(False), {})

    return Env(reset, step, 3, None)
