"""Accelerators with their published figures, and pods of them by name: `v5e:8x8`, `h100:16`."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

GB = 1e9
GIB = 2.0**30


class Chip(NamedTuple):
    """The published peaks of one accelerator."""

    name: str
    kind: str  # the beginning of jax's `Device.device_kind`
    flops: float  # bfloat16 operations a second, dense
    hbm_bytes: float
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second, one way: of one link of a torus; of a GPU's NVLink
    torus: int = 0  # dimensions of the torus of a pod; 0: nodes of 8, with a network between them
    ring: int = 0  # chips along a dimension of the torus, a multiple of which closes to a ring
    network_bandwidth: float = 0.0  # bytes a second of one chip between nodes, one way
    vector_flops: float = 0.0  # float32 operations a second of a GPU, without its tensor cores

    def peak_flops(self, dtype: str) -> float:
        """Operations a second of products in this dtype; of float32 ones in full precision, as all scripts ask for."""
        if dtype != "float32":
            return self.flops
        return self.flops / BFLOAT16_PASSES if self.torus else self.vector_flops


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: "peak compute per chip (bf16)", HBM capacity and bandwidth, and
# the bidirectional bandwidth of all links of a chip, here of one link in one direction. A dimension of the torus closes
# to a ring at 16 chips (v5e, v6e) and in slices of whole cubes of 4 x 4 x 4 (v4, v5p). A product in float32 is six of
# parts in bfloat16 (XLA's algorithm BF16_BF16_F32_X6).
# GPU: NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200, bfloat16 without sparsity, and FP32, for which there are
# no tensor cores; NVLink is 900 and 1,800 GB/s both ways. The network is one 400 Gb/s port a GPU, as in DGX H100 and
# B200.
BFLOAT16_PASSES = 6
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 32 * GIB, 1228 * GB, 50 * GB, torus=3, ring=4),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 50 * GB, torus=2, ring=16),
        Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765 * GB, 100 * GB, torus=3, ring=4),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1638 * GB, 100 * GB, torus=2, ring=16),
        Chip(
            "h100", "NVIDIA H100", 989e12, 80 * GB, 3350 * GB, 450 * GB, network_bandwidth=50 * GB, vector_flops=67e12
        ),
        Chip(
            "h200", "NVIDIA H200", 989e12, 141 * GB, 4800 * GB, 450 * GB, network_bandwidth=50 * GB, vector_flops=67e12
        ),
        Chip(
            "b200", "NVIDIA B200", 2250e12, 180 * GB, 8000 * GB, 900 * GB, network_bandwidth=50 * GB, vector_flops=75e12
        ),
    )
}
GPUS_OF_NODE = 8


class Topology(NamedTuple):
    """Chips that are connected: a slice of a TPU pod, or nodes of GPUs."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # of the torus; (number,) of GPUs

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.chip.torus > 0

    def bandwidth(self, places: Sequence[Sequence[int]]) -> float:
        """Bytes a second that each of a group of chips sends in a ring over them, all groups at the same time.

        A group that spans several dimensions of the torus uses the links of all of them, in both directions where a
        dimension closes to a ring. Chips that are not neighbors share links with the other groups between them.

        A group of one chip sends nothing: infinite.

        places: of each chip of the group in the torus, or its number among the GPUs.
        """
        if not self.is_tpu:
            nodes = {place[0] // GPUS_OF_NODE for place in places}
            if len(nodes) == 1:
                return self.chip.link_bandwidth
            return min(self.chip.link_bandwidth, self.chip.network_bandwidth * self._ways(places))
        total = 0.0
        for axis, size in enumerate(self.shape):
            along = sorted({place[axis] for place in places})
            if len(along) == 1:
                continue
            stride = min(b - a for a, b in pairwise(along))
            closes = len(along) == size and self._closes(axis)
            total += self.chip.link_bandwidth * (2 if closes else 1) / stride
        return total or math.inf

    def _closes(self, axis: int) -> bool:
        """Whether a dimension of the torus is a ring: of three dimensions none is, or all are."""
        sizes = self.shape if self.chip.torus == 3 else self.shape[axis : axis + 1]
        return all(size % self.chip.ring == 0 for size in sizes)

    def _ways(self, places: Sequence[Sequence[int]]) -> int:
        """Ports of a node that a group has: one for each of its GPUs there."""
        per_node = [place[0] // GPUS_OF_NODE for place in places]
        return max(per_node.count(node) for node in set(per_node))


def read_topology(name: str) -> Topology:
    """`v5e:8x8` or `h100:16`. Raises ValueError, with what is legal, for any other name."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.lower())
    chip = CHIPS.get(found[1]) if found else None
    shape = tuple(int(size) for size in found[2].split("x")) if found else ()
    is_legal = chip is not None and len(shape) == (chip.torus or 1) and min(shape) >= 1
    if is_legal and not chip.torus:
        is_legal = shape[0] <= GPUS_OF_NODE or shape[0] % GPUS_OF_NODE == 0
    if not is_legal:
        tpus = [f"{chip.name}:{'x'.join('ABC'[: chip.torus])}" for chip in CHIPS.values() if chip.torus]
        gpus = [f"{chip.name}:N" for chip in CHIPS.values() if not chip.torus]
        raise ValueError(
            f"topology {name!r}; legal: {', '.join(tpus)} (chips along each dimension, as v5e:8x8), {', '.join(gpus)} "
            f"(GPUs, {GPUS_OF_NODE} a node, as h100:16)"
        )
    return Topology(name.lower(), chip, shape)


def chip_of(device_kind: str) -> Chip | None:
    """The accelerator of this kind; None where it is none of CHIPS."""
    matching = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(matching, key=lambda chip: len(chip.kind), default=None)


def hbm_bytes(device_kind: str) -> float:
    """Memory of a device of this kind; 16e9 where it is none of CHIPS."""
    chip = chip_of(device_kind)
    return chip.hbm_bytes if chip else 16e9
