"""What benchmarks share: the works, the ceilings of this machine, and timing side by side."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models.decoder import DecoderConfig
from rljax.types import Rows

W1 = DecoderConfig(4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=688)
W2 = DecoderConfig(
    32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1376
)


def prompts(config: DecoderConfig, count: int, length: int) -> Rows:
    """Random prompts of one length."""
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (count, length), np.int32)
    return Rows(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32), [], 0)


def alternately(works: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each work(i), the works taking turns; the first round, which compiles, is left out."""
    times = {name: [] for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            jax.block_until_ready(work(i))
            times[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in times.items()}


def seconds(work: Callable[[int], object], repeats: int) -> float:
    """Median wall time of work(i), after one run that compiles."""
    return statistics.median(alternately({"": work}, repeats)[""])


def peak(repeats: int, dtype: str = "float32") -> float:
    """FLOPs a second of the better of two matmuls, at their best."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 512, 1024)):
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        best = max(best, 2 * m * k * n / min(alternately({"": lambda _, a=a, b=b: jnp.dot(a, b)}, repeats)[""]))
    return best


def bandwidth(repeats: int) -> float:
    """Bytes a second of a copy of 256 MiB, at its best: read and written."""
    source = jnp.ones(2**26, jnp.float32)
    return 2 * source.nbytes / min(alternately({"": lambda _: jnp.copy(source)}, repeats)[""])
