"""What benchmarks share: the workloads, the limits of this machine, and timing side by side."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models.decoder import DecoderConfig
from rljax.types import PromptBatch

W1 = DecoderConfig(4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=688)
W2 = DecoderConfig(
    32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1376
)


def prompts(config: DecoderConfig, count: int, length: int) -> PromptBatch:
    """Random prompts of one length."""
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (count, length), np.int32)
    return PromptBatch(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32), [], 0)


def alternately(works: dict[str, Callable[[int], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each work(i), taking turns; the first round, which compiles, is left out."""
    times = {name: [] for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work(i))
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def seconds(work: Callable[[int], object], repeats: int) -> float:
    """Median wall time of work(i), after one run that compiles."""
    return statistics.median(alternately({"": work}, repeats)[""])


def peak(repeats: int, dtype: str = "float32") -> float:
    """FLOPs a second of the faster of two matmuls, in its fastest run."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 512, 1024)):
        a = jnp.ones((m, k), dtype)
        b = jnp.ones((k, n), dtype)
        times = alternately({"": lambda _, a=a, b=b: jnp.dot(a, b)}, repeats)[""]
        best = max(best, 2 * m * k * n / min(times))
    return best


def bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB in its fastest run."""
    source = jnp.ones(2**26, jnp.float32)
    times = alternately({"": lambda _: jnp.copy(source)}, repeats)[""]
    return 2 * source.nbytes / min(times)
