"""Layers stacked along a leading axis, for a decoder that scans them (`DecoderConfig.scan_layers`).

    one by one   layers/0/attention/query [D H K], layers/1/attention/query [D H K], ...
    stacked      layers/from_0_to_27_by_1/attention/query [28 D H K]

Layers may differ in kind (sliding windows, positions, experts). A scan then goes over periods: its body has one layer
of each of the period's places, and the layers of one place are a stack. Files of models and adapters hold layers one
by one.
"""

import re
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from rljax.types import Params

NAME = re.compile(r"from_(\d+)_to_(\d+)_by_(\d+)")


def find_scans(kinds: Sequence[Hashable]) -> tuple[tuple[range, ...], ...]:
    """The scans that compute layers of these kinds, each as the stacks of its body: the layers of each.

    From the first layer on, always the period that covers most layers by repeating, the shortest of those. Layers that
    nothing repeats are a scan of one.
    """
    scans = []
    start = 0
    while start < len(kinds):
        counts = {period: _count_repeats(kinds[start:], period) for period in range(1, len(kinds) - start + 1)}
        covered = {period: period * count for period, count in counts.items() if count > 1 or period == 1}
        period = max(covered, key=covered.get)
        stop = start + covered[period]
        scans.append(tuple(range(first, stop, period) for first in range(start, start + period)))
        start = stop
    return tuple(scans)


def _count_repeats(kinds: Sequence[Hashable], period: int) -> int:
    """How many times the first `period` kinds come one after the other from the start on."""
    count = 1
    while kinds[count * period : (count + 1) * period] == kinds[:period]:
        count += 1
    return count


def stack_name(layers: range) -> str:
    """The key of a stack in the parameter tree. No pattern that is meant for one layer ("layers/3/") finds it."""
    return f"from_{layers[0]}_to_{layers[-1]}_by_{layers.step}"


def layers_of(path: tuple) -> range | None:
    """The layers that a parameter has along its first axis, given its path in a decoder; None: it is of one layer."""
    match = NAME.fullmatch(str(path[1])) if path[0] == "layers" else None
    if match is None:
        return None
    first, last, step = map(int, match.groups())
    return range(first, last + 1, step)


def are_stacked(params: Params) -> bool:
    """Whether a tree with decoders or adapters anywhere in it has stacked layers."""
    return any(NAME.fullmatch(str(name)) or (isinstance(x, dict) and are_stacked(x)) for name, x in params.items())


def stack(scans: tuple[tuple[range, ...], ...], params: Params) -> Params:
    """A decoder's parameters or an adapter's with stacks in the place of single layers.

    Raises ValueError for an adapter of some of a stack's layers, or one that adapts them differently.
    """
    stacked = {}
    for layers in (layers for scan in scans for layers in scan):
        blocks = [params["layers"].get(layer, {}) for layer in layers]
        if len({jax.tree.structure(block) for block in blocks}) > 1:
            raise ValueError(
                f"layers {list(layers)} are not adapted alike, so they cannot be scanned; legal: scan_layers=False"
            )
        if blocks[0]:
            stacked[stack_name(layers)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "layers": stacked}


def unstack(params: Params) -> Params:
    """A decoder's parameters or an adapter's with single layers in the place of stacks: the inverse of `stack`."""
    single = {}
    for name, block in params["layers"].items():
        for place, layer in enumerate(layers_of(("layers", name))):
            single[layer] = jax.tree.map(lambda x, place=place: x[place], block)
    return {**params, "layers": dict(sorted(single.items()))}
