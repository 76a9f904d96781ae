"""The language model's own process as an environment: a state is a text, an action its next token, s' = s · a.

The transition is certain, all reward stands at the end, and γ = 1: a rollout of a language model is an episode of this
environment, and its credit, losses and updates are the same functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step

NOTHING = -1  # stands where no token is yet


class State(NamedTuple):
    tokens: jax.Array  # [L + limit], NOTHING after `length`
    length: jax.Array


def make_token_mdp(prompts, vocabulary: int, limit: int, reward: Callable, stop: int | None = None) -> Env:
    """Prompts [P L], one drawn at each reset; at most `limit` tokens follow. Observed are the tokens [L + limit].

    Args: reward: (tokens [L + limit], length) -> number, of the whole text, paid by the token that ends it. stop: the
    token that terminates; a text cut by the limit is truncated.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    L = prompts.shape[1]

    def reset(key, prompts):
        prompt = prompts[jax.random.randint(key, (), 0, prompts.shape[0])]
        tokens = jnp.pad(prompt, (0, limit), constant_values=NOTHING)
        return tokens, State(tokens, jnp.int32(L))

    def step(key, state: State, action, prompts) -> Step:
        tokens = state.tokens.at[state.length].set(action)
        new = State(tokens, state.length + 1)
        stopped = jnp.bool_(False) if stop is None else action == stop
        cut = ~stopped & (new.length >= L + limit)
        earned = jnp.where(stopped | cut, reward(tokens, new.length), 0.0)
        return Step(tokens, new, earned, stopped, cut, {})

    return Env(reset, step, vocabulary, prompts)
