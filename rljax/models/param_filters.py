"""Parts of a tree of parameters, by path: what is trained, what decays, what learns at which rate.

A leaf's path is its names: decoder/layers/3/attention/query. A pattern is a regular expression that is searched in it:
"layers/[01]/", "^value_head", "_bias$". A tree of booleans is what optax takes as a mask; labels for optax.partition
are made of it by jax.tree.map.
"""

import re
from collections.abc import Iterable

import jax

from rljax.types import Params


def name(path: tuple) -> str:
    """Of a leaf, from its path in jax's form."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Params) -> list[str]:
    """Paths of all leaves, in the order of jax.tree.leaves."""
    return [name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names in which one of the patterns is found. Raises ValueError where a pattern is found in none."""
    names = list(names)
    found = {pattern: {n for n in names if re.search(pattern, n)} for pattern in patterns}
    if barren := [pattern for pattern, hits in found.items() if not hits]:
        kinds = dict.fromkeys(re.sub(r"\b\d+\b", "*", n) for n in names)
        raise ValueError(f"no path matches {', '.join(map(repr, barren))}; there are {', '.join(kinds)}")
    return set().union(*found.values())


def select(tree: Params, *patterns: str) -> Params:
    """A tree of booleans: True where a pattern matches. Raises ValueError where one matches nothing."""
    chosen = matching(names(tree), patterns)
    return jax.tree.map_with_path(lambda path, _: name(path) in chosen, tree)


def freeze(params: Params, *patterns: str) -> tuple[Params, Params]:
    """(trained, base): what matches moves to the base, for frozen["base"]; `decoder.whole` lays the rest over it.

    A reference is then the trained part as it was at first. Raises ValueError where a pattern matches nothing.
    """
    frozen = select(params, *patterns)
    return _kept(params, frozen, False), _kept(params, frozen, True)


def _kept(tree: Params, marks: Params, mark: bool) -> Params:
    """The leaves with this mark, and no empty dicts."""
    if not isinstance(tree, dict):
        return tree
    return {n: _kept(x, marks[n], mark) for n, x in tree.items() if mark in jax.tree.leaves(marks[n])}


def matrices(tree: Params) -> Params:
    """A tree of booleans: True for what weight decay is for: matrices and tables, neither norms nor biases.

    By name, not by axes alone: a bias of queries is [H K], the scale of a norm may be.
    """

    def one(path, leaf):
        last = name(path[-1:])
        return leaf.ndim > 1 and last not in ("scale", "magnitude") and not last.endswith("bias")

    return jax.tree.map_with_path(one, tree)
