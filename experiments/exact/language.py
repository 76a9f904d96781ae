"""A language model so small that every answer can be listed: expectations are sums, and nothing is sampled.

V tokens, of which 0 ends an answer, and at most T of them: N answers. A policy is a softmax of one row of logits per
prefix: a table [S V]. Everything here wants `jax.enable_x64(True)`.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Tree(NamedTuple):
    """All answers, padded on the right; decision t was made on seeing prefix number `prefix[:, t]`."""

    prefix: np.ndarray  # [N T]
    actions: np.ndarray  # [N T]
    mask: np.ndarray  # [N T]
    ended: np.ndarray | bool  # [N] by token 0, not by the length
    prefixes: int  # S
    vocabulary: int  # V


def tree(vocabulary: int, length: int) -> Tree:
    """Every answer of `vocabulary` tokens: closed by token 0, or `length` long."""
    rest = range(1, vocabulary)
    answers = [(*p, 0) for n in range(length) for p in itertools.product(rest, repeat=n)]
    answers += [(*p, a) for p in itertools.product(rest, repeat=length - 1) for a in rest]
    numbers = {p: i for i, p in enumerate(p for n in range(length) for p in itertools.product(rest, repeat=n))}
    prefix, actions = np.zeros((2, len(answers), length), np.int64)
    mask = np.arange(length) < np.array([len(y) for y in answers])[:, None]
    for i, y in enumerate(answers):
        actions[i, : len(y)] = y
        prefix[i, : len(y)] = [numbers[y[:t]] for t in range(len(y))]
    return Tree(prefix, actions, mask, np.array([y[-1] == 0 for y in answers]), len(numbers), vocabulary)


def chosen(lm: Tree, table):
    """log π of every decision of every answer, 0 where there is none. [N T]"""
    return jnp.where(lm.mask, jax.nn.log_softmax(table)[lm.prefix, lm.actions], 0.0)


def log_prob(lm: Tree, table):
    """log π(y). [N]"""
    return chosen(lm, table).sum(1)


def sequence_kl(lm: Tree, p, q):
    """KL(p ‖ q) of whole answers, nats."""
    log_p = log_prob(lm, p)
    return jnp.exp(log_p) @ (log_p - log_prob(lm, q))


def visits(lm: Tree, table):
    """Probability of passing through each prefix. [S]"""
    mass = jnp.where(lm.mask, jnp.exp(log_prob(lm, table))[:, None], 0.0)
    return jnp.zeros(lm.prefixes).at[lm.prefix].add(mass)


def values(lm: Tree, table, rewards):
    """V(prefix): mean of what is paid from there on, rewards [N T]. [S]"""
    to_go = jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    mass = jnp.where(lm.mask, jnp.exp(log_prob(lm, table))[:, None], 0.0)
    return jnp.zeros(lm.prefixes).at[lm.prefix].add(mass * to_go) / visits(lm, table)


def at_the_end(lm: Tree, x):
    """[N] -> [N T]: on the last decision."""
    last = lm.mask & (np.cumsum(lm.mask[:, ::-1], 1)[:, ::-1] == 1)
    return jnp.where(last, x[:, None], 0.0)
