"""A language model so small that every completion can be listed: expectations are sums, and nothing is sampled.

There are V tokens, of which token 0 ends a completion, and completions have at most T tokens. That makes N completions
with S different prefixes. A policy is a softmax with one row of logits for each prefix: logits [S V]. Everything here
is to be called under `jax.enable_x64(True)`.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Tree(NamedTuple):
    """All completions, padded on the right. Before token t the model has seen prefix number `prefix[:, t]`."""

    prefix: np.ndarray  # [N T]
    actions: np.ndarray  # [N T]
    mask: np.ndarray  # [N T]
    ended: np.ndarray | bool  # [N] whether token 0 ended it, rather than the length
    num_prefixes: int  # S
    vocab_size: int  # V


def make_tree(vocab_size: int, max_length: int) -> Tree:
    """Every completion of `vocab_size` tokens: ended by token 0, or `max_length` long."""
    other_tokens = range(1, vocab_size)
    prefixes = [p for n in range(max_length) for p in itertools.product(other_tokens, repeat=n)]
    number = {p: i for i, p in enumerate(prefixes)}
    completions = [(*p, 0) for p in prefixes]
    completions += [
        (*p, token) for p in itertools.product(other_tokens, repeat=max_length - 1) for token in other_tokens
    ]

    prefix, actions = np.zeros((2, len(completions), max_length), np.int64)
    for i, tokens in enumerate(completions):
        actions[i, : len(tokens)] = tokens
        prefix[i, : len(tokens)] = [number[tokens[:t]] for t in range(len(tokens))]
    lengths = np.array([len(tokens) for tokens in completions])
    mask = np.arange(max_length) < lengths[:, None]
    ended = np.array([tokens[-1] == 0 for tokens in completions])
    return Tree(prefix, actions, mask, ended, len(prefixes), vocab_size)


def token_logps(tree: Tree, logits):
    """log π of every token of every completion, 0 after its end. [N T]"""
    return jnp.where(tree.mask, jax.nn.log_softmax(logits)[tree.prefix, tree.actions], 0.0)


def sequence_logps(tree: Tree, logits):
    """log π of every completion. [N]"""
    return token_logps(tree, logits).sum(1)


def sequence_kl(tree: Tree, p, q):
    """KL(p ‖ q) of completions, in nats; p, q: logits [S V]."""
    log_p = sequence_logps(tree, p)
    return jnp.exp(log_p) @ (log_p - sequence_logps(tree, q))


def visit_probs(tree: Tree, logits):
    """Probability that a completion passes through each prefix. [S]"""
    mass = jnp.where(tree.mask, jnp.exp(sequence_logps(tree, logits))[:, None], 0.0)
    return jnp.zeros(tree.num_prefixes).at[tree.prefix].add(mass)


def prefix_values(tree: Tree, logits, rewards):
    """V(prefix): mean of the rewards [N T] from there on. [S]"""
    return_to_go = jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    mass = jnp.where(tree.mask, jnp.exp(sequence_logps(tree, logits))[:, None], 0.0)
    return jnp.zeros(tree.num_prefixes).at[tree.prefix].add(mass * return_to_go) / visit_probs(tree, logits)


def on_last_token(tree: Tree, x):
    """[N] -> [N T]: x on the last token of each completion, 0 elsewhere."""
    last = tree.mask & (np.cumsum(tree.mask[:, ::-1], 1)[:, ::-1] == 1)
    return jnp.where(last, x[:, None], 0.0)
