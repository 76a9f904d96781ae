"""In how many pieces an update is computed, and how many neighboring rows share their prompt in each."""

from typing import NamedTuple

import jax

from experiments.common import activations
from experiments.common.chips import Chip, hbm_bytes
from experiments.common.settings import Batches
from rljax.models.attention import flash_kernel
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import data_parallel_size

# A device multiplies this many columns at about its best rate; more at a time only take memory.
ENOUGH_COLUMNS_ON_CPU = 512
ENOUGH_COLUMNS_ELSEWHERE = 8192
# Of activations. A CPU's would come from memory instead of its caches; elsewhere a quarter of the device's memory.
CPU_BYTES = 256e6


class Pieces(NamedTuple):
    """The cut of an update."""

    micro_batches: int
    group_size: int  # neighboring rows that share their prompt: a group, or an equal share of one


def cut(
    config: DecoderConfig,
    batches: Batches,
    prompt_tokens: int,
    max_tokens: int,
    mesh: jax.sharding.Mesh,
    chip: Chip | None = None,
) -> Pieces:
    """The cut that `batches` asks for; with micro_batches = 0 one chosen from sizes.

    That is the largest number of micro-batches of whole groups which still have enough columns for the device, and more
    where their activations would not fit (`activations.of_update`: those depend on `config.remat`, on how the mesh
    splits heads and columns, and on whether a kernel computes attention).

    chip: of a mesh without devices.
    """
    rows = batches.prompts * batches.num_generations // batches.minibatches
    devices = data_parallel_size(mesh)
    # Shuffled minibatches separate the rows of a group.
    group_size = batches.num_generations if batches.minibatches == 1 else 1
    if batches.micro_batches:
        return Pieces(batches.micro_batches, largest_share(rows, group_size, batches.micro_batches * devices))

    device = _device_of(mesh, chip)
    dense = activations.is_dense(config, mesh, device.kernel)
    grouped = device.platform in activations.GROUPED

    def held_by(pieces: int) -> tuple[int, float, float]:
        """Rows that share a prompt, columns, and bytes of activations, of one device."""
        share = largest_share(rows, group_size, pieces)
        parts = pieces * mesh.shape["sequence"]
        columns = columns_of(rows, share, prompt_tokens, max_tokens) / parts
        keys = prompt_tokens + max_tokens
        held = activations.of_update(config, mesh, columns, rows * max_tokens / parts, keys, dense, grouped)
        return share, columns, sum(held.values())

    chosen = devices
    for pieces in range(2 * devices, rows + 1, devices):
        if rows % pieces:
            continue
        _, _, size = held_by(chosen)
        share, fewer_columns, _ = held_by(pieces)
        if size <= device.activation_bytes and (share < group_size or fewer_columns < device.enough_columns):
            break
        chosen = pieces
    return Pieces(chosen // devices, held_by(chosen)[0])


def largest_share(rows: int, group_size: int, pieces: int) -> int:
    """The most neighboring rows of a group that always stay together when `rows` are cut into `pieces`."""
    return max(share for share in range(1, group_size + 1) if group_size % share == 0 and rows % (share * pieces) == 0)


def columns_of(rows: int, share: int, prompt_tokens: int, max_tokens: int) -> int:
    """Columns that are computed for so many rows: each completion, and the prompt once for each share."""
    return rows * max_tokens + rows // share * (prompt_tokens - 1)


class _Device(NamedTuple):
    """What the cut depends on of the devices that it is made for."""

    platform: str
    kernel: str  # of attention
    enough_columns: int
    activation_bytes: float  # at most


def _device_of(mesh: jax.sharding.Mesh, chip: Chip | None) -> _Device:
    """Of the mesh, whose devices are this machine's or those of a pod that the program is compiled for."""
    if chip is not None:
        platform = "tpu" if chip.torus else "gpu"
        return _Device(platform, activations.KERNELS[platform], ENOUGH_COLUMNS_ELSEWHERE, chip.hbm_bytes / 4)
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return _Device("cpu", "xla", ENOUGH_COLUMNS_ON_CPU, CPU_BYTES)
    is_here = device.platform == jax.default_backend()
    stats = (device.memory_stats() if is_here else None) or {}
    memory = stats.get("bytes_limit") or hbm_bytes(device.device_kind)
    return _Device(device.platform, flash_kernel(device), ENOUGH_COLUMNS_ELSEWHERE, memory / 4)
