"""What benchmarks share: the workloads, timing side by side, and where figures and profiles are written."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro

from experiments.common.command_line import multiply_in_float32
from rljax.models.decoder import DecoderConfig
from rljax.types import PromptBatch

W1 = DecoderConfig(4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=688)
W2 = DecoderConfig(
    32768, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1376
)


class Workload(NamedTuple):
    """A model, and how much it samples."""

    config: DecoderConfig
    prompts: int
    n: int  # completions per prompt
    prompt_tokens: int
    completion_tokens: int

    @property
    def rows(self) -> int:
        return self.prompts * self.n


WORKLOADS = {"W1": Workload(W1, 8, 8, 32, 64), "W2": Workload(W2, 2, 8, 128, 128)}


def prompts(config: DecoderConfig, count: int, length: int) -> PromptBatch:
    """Random prompts of one length."""
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (count, length), np.int32)
    return PromptBatch(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32), [], 0)


def alternately(works: dict[str, Callable[[int], object]], repeats: int, untimed: int = 0) -> dict[str, list[float]]:
    """Wall seconds of each work(i), taking turns; the first round, which compiles, is left out.

    `untimed`: how often a work is done at the beginning of its turn before it is timed.
    """
    times = {name: [] for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            for _ in range(untimed):
                jax.block_until_ready(work(i))
            start = time.perf_counter()
            jax.block_until_ready(work(i))
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def seconds(work: Callable[[int], object], repeats: int) -> float:
    """Median wall time of work(i), after one run that compiles."""
    return statistics.median(alternately({"": work}, repeats)[""])


def run(config_type: type, main: Callable) -> None:
    """`main` with the settings of the command line; products are computed in the precision that recipes set."""
    multiply_in_float32()
    main(tyro.cli(config_type, config=(tyro.conf.FlagConversionOff,), use_underscores=True))


# ------------------------------------------------------------------------------------------------------------- output


@dataclasses.dataclass(frozen=True)
class Output:
    """What every benchmark can write besides its tables."""

    json: str = ""  # where to write the figures
    profile: str = ""  # a folder for a trace of one run of each, for Perfetto or TensorBoard


def write_figures(path: str, figures: Mapping[str, float]) -> None:
    """{name: value} as JSON; no file for an empty path."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1, ensure_ascii=False))


def named(rows: list[dict], prefix: str = "") -> dict[str, float]:
    """The numbers in the rows of a table, each by the name of its row, which is in the first column, and its column."""
    figures = {}
    for row in rows:
        title, *columns = row
        values = {column: row[column] for column in columns if isinstance(row[column], int | float)}
        figures |= {f"{prefix}{row[title]}, {column}": value for column, value in values.items()}
    return figures


def trace(works: Mapping[str, Callable[[int], object]], folder: str) -> None:
    """A profile of one run of each work, in a folder of its own; nothing for an empty `folder`."""
    if not folder:
        return
    for name, work in works.items():
        jax.block_until_ready(work(0))  # compiled before the trace begins
        with jax.profiler.trace(f"{folder}/{name.replace('/', ' ')}"):
            jax.block_until_ready(work(0))
