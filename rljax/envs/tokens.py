"""The language model's own process as an environment: a state is a text, an action its next token, s' = s · a.

The transition is deterministic, all reward comes with the last token, and γ = 1: a rollout of a language model is an
episode of this environment, and its credit, losses and updates are the same functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step

NO_TOKEN = -1  # fills the columns after the text


class State(NamedTuple):
    tokens: jax.Array  # [L + max_tokens], NO_TOKEN after `length`
    length: jax.Array


def make_token_mdp(
    prompts: jax.Array, vocabulary: int, max_tokens: int, reward: Callable, stop: int | None = None
) -> Env:
    """Prompts [P L], one drawn at each reset; at most N = max_tokens tokens follow. Observed are the tokens [L + N].

    Args: reward: (tokens [L + N], length) -> reward of the whole text, given for its last token. stop: the token that
    terminates; a text without it is truncated after N.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    L = prompts.shape[1]

    def reset(key, prompts):
        prompt = prompts[jax.random.randint(key, (), 0, prompts.shape[0])]
        tokens = jnp.pad(prompt, (0, max_tokens), constant_values=NO_TOKEN)
        return tokens, State(tokens, jnp.int32(L))

    def step(key, state: State, action, prompts) -> Step:
        tokens = state.tokens.at[state.length].set(action)
        new = State(tokens, state.length + 1)
        terminated = jnp.bool_(False) if stop is None else action == stop
        truncated = ~terminated & (new.length >= L + max_tokens)
        earned = jnp.where(terminated | truncated, reward(tokens, new.length), 0.0)
        return Step(tokens, new, earned, terminated, truncated, {})

    return Env(reset, step, vocabulary, prompts)
