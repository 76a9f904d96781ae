"""Filters of parameters by path: what is trained, what decays, what has which learning rate.

A leaf's path is made of its keys: decoder/layers/3/attention/query. A pattern is a regular expression, searched in the
path: "layers/[01]/", "^value_head", "_bias$". optax takes a tree of booleans as a mask; with jax.tree.map it becomes
the labels of optax.partition.
"""

import re
from collections.abc import Iterable

import jax

from rljax.types import Params


def param_path(path: tuple) -> str:
    """The path of a leaf, from jax's tuple of keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_paths(tree: Params) -> list[str]:
    """Paths of all leaves, in the order of jax.tree.leaves."""
    return [param_path(path) for path, _ in jax.tree.leaves_with_path(tree)]


def match_paths(paths: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The paths in which one of the patterns is found. Raises ValueError if a pattern is found in none."""
    paths = list(paths)
    matches = {pattern: {path for path in paths if re.search(pattern, path)} for pattern in patterns}
    unmatched = [pattern for pattern, found in matches.items() if not found]
    if unmatched:
        kinds = dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in paths)
        raise ValueError(f"no path matches {', '.join(map(repr, unmatched))}; there are {', '.join(kinds)}")
    return set().union(*matches.values())


def path_mask(tree: Params, *patterns: str) -> Params:
    """A tree of booleans: True where a pattern matches. Raises ValueError if a pattern matches nothing."""
    chosen = match_paths(param_paths(tree), patterns)
    return jax.tree.map_with_path(lambda path, _: param_path(path) in chosen, tree)


def split_frozen(params: Params, *patterns: str) -> tuple[Params, Params]:
    """(trained, base): what matches goes into the base, for frozen["base"]; `decoder.full_params` joins them again.

    A reference policy is then a copy of the trained part. Raises ValueError if a pattern matches nothing.
    """
    is_frozen = path_mask(params, *patterns)
    return _leaves_marked(params, is_frozen, False), _leaves_marked(params, is_frozen, True)


def _leaves_marked(tree: Params, marks: Params, mark: bool) -> Params:
    """The leaves with this mark, and no empty dicts."""
    if not isinstance(tree, dict):
        return tree
    present = (name for name in tree if mark in jax.tree.leaves(marks[name]))
    return {name: _leaves_marked(tree[name], marks[name], mark) for name in present}


def decay_mask(tree: Params) -> Params:
    """A tree of booleans: True where weight decay applies: matrices and tables, neither norms nor biases.

    Decided by name, not only by the number of axes: a bias of queries is [H K], and so may be the scale of a norm.
    """

    def decays(path, leaf):
        name = param_path(path[-1:])
        return leaf.ndim > 1 and name not in ("scale", "magnitude") and not name.endswith("bias")

    return jax.tree.map_with_path(decays, tree)
