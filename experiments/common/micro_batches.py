"""In how many pieces an update is computed, and how many neighboring rows share their prompt in each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.common.chips import hbm_bytes
from experiments.common.settings import Batches
from rljax.models.decoder import DecoderConfig

# A device multiplies this many columns at about its best rate; more at a time only take memory.
ENOUGH_COLUMNS = {"cpu": 512}
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
    devices: int,
    device_bytes: float | None = None,
) -> Pieces:
    """The cut that `batches` asks for; with micro_batches = 0 one chosen from sizes.

    That is the largest number of micro-batches of whole groups which still have enough columns for the device, and more
    where their activations would not fit.

    device_bytes: memory of an accelerator that is not there; None: of those that the decoder runs on.
    """
    rows = batches.prompts * batches.num_generations // batches.minibatches
    # Shuffled minibatches separate the rows of a group.
    group_size = batches.num_generations if batches.minibatches == 1 else 1
    if batches.micro_batches:
        return Pieces(batches.micro_batches, largest_share(rows, group_size, batches.micro_batches * devices))

    backend = config.backend if device_bytes is None else ""
    enough = ENOUGH_COLUMNS.get(backend, ENOUGH_COLUMNS_ELSEWHERE)
    most_bytes = CPU_BYTES if backend == "cpu" else (device_bytes or _bytes_of_device(config)) / 4
    bytes_of_column = activation_bytes(config, prompt_tokens + max_tokens, backend)

    def share_and_columns(pieces: int) -> tuple[int, int]:
        share = largest_share(rows, group_size, pieces)
        return share, columns_of(rows // pieces, share, prompt_tokens, max_tokens)

    chosen = devices
    for pieces in range(2 * devices, rows + 1, devices):
        if rows % pieces:
            continue
        _, columns = share_and_columns(chosen)
        share, fewer_columns = share_and_columns(pieces)
        if columns * bytes_of_column <= most_bytes and (share < group_size or fewer_columns < enough):
            break
        chosen = pieces
    return Pieces(chosen // devices, share_and_columns(chosen)[0])


def largest_share(rows: int, group_size: int, pieces: int) -> int:
    """The most neighboring rows of a group that always stay together when `rows` are cut into `pieces`."""
    return max(share for share in range(1, group_size + 1) if group_size % share == 0 and rows % (share * pieces) == 0)


def columns_of(rows: int, share: int, prompt_tokens: int, max_tokens: int) -> int:
    """Columns that are computed for so many rows: each completion, and the prompt once for each share."""
    return rows * max_tokens + rows // share * (prompt_tokens - 1)


def activation_bytes(config: DecoderConfig, keys: int, backend: str) -> int:
    """About what the backward pass keeps of a token that attends to so many keys: inputs of products, and scores."""
    size = jnp.dtype(config.dtype).itemsize
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    numbers = 4 * config.hidden_size + heads * config.head_dim + 3 * config.intermediate_size
    scores = 8 * config.num_heads * keys if backend == "cpu" else 0  # elsewhere kernels compute them again
    return config.num_layers * (size * numbers + scores)


def _bytes_of_device(config: DecoderConfig) -> float:
    """Of this machine's devices, or of those of the pod that the program is compiled for."""
    devices = jax.devices() if config.hidden_sharding is None else config.hidden_sharding.mesh.devices.flat
    device = next(iter(devices))
    is_here = device.platform == jax.default_backend()
    stats = (device.memory_stats() if is_here else None) or {}
    return stats.get("bytes_limit") or hbm_bytes(device.device_kind)
