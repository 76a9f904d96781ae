r"""A checkpoint as a Hugging Face model directory that transformers loads.

    python experiments/tools/export.py --run runs/grpo/DIR --out exported
    python experiments/tools/export.py --run runs/grpo/DIR --out adapter --adapter separate     # PEFT's format
    python experiments/tools/export.py --run runs/grpo/DIR --out exported --step 20 --dtype bfloat16

Writes the weights with their index, config, tokenizer, chat template and generation config, all on the CPU; an
interrupted export leaves no partial directory. An adapter is merged in float32 into the model that it was trained on,
if that is still where it was, else into the checkpoint's copy, which has the precision of the computation.

Reached: both ways transformers and peft load the same bits (tests/test_export.py, tests/models/test_peft.py).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.common import command_line
from rljax.models import decoder, hf, lora, peft
from rljax.train.checkpoint import restore_items
from rljax.train.log import log_info
from rljax.types import Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Which checkpoint, and where to."""

    run: str  # a run directory
    out: str  # the directory to write; must be empty or absent
    step: int = 0  # step of the checkpoint; 0: the newest good one
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # of the weights; default: that of the original model
    adapter: Literal["merged", "separate"] = "merged"  # merged into the weights, or alone in PEFT's format
    shard_gigabytes: float = 5.0  # gigabytes of the largest file


def main(cfg: Config) -> None:
    """Read the checkpoint, and write the directory."""
    model_files = Path(cfg.run) / "model"
    if not model_files.is_dir():
        raise ValueError(f"{cfg.run} is no run directory of a language model: it has no model/config.json")
    config = hf.read_config(model_files)
    adapter, base_directory = hf.read_adapter(model_files)
    separate = cfg.adapter == "separate"
    if separate and adapter is None:
        raise ValueError(f"{cfg.run} trained no adapter; legal: --adapter merged")

    # The checkpoint's copy of a base need not be read where the base is still in its own directory.
    base_is_there = base_directory != model_files
    needed = ("params",) if separate or base_is_there else ("params", "frozen")
    step, parts = restore_items(Path(cfg.run) / "checkpoints", *needed, step=cfg.step or None)
    trained = dict(parts["params"])
    low_rank = trained.pop("lora", None)
    if separate:
        peft.save_adapter(cfg.out, dataclasses.replace(config, adapter=adapter), low_rank, base_directory)
    else:
        if base_is_there:
            params = hf.load(base_directory, config)
        else:
            params = decoder.full_params(config, trained, parts["frozen"])["decoder"]
        if low_rank is not None:
            params = merge(adapter, params, low_rank, base_is_there)
        max_bytes = int(cfg.shard_gigabytes * 10**9)
        hf.save(cfg.out, config, params, model_files, cfg.dtype or None, max_bytes, trained.get("score_head"))
    log_info(f"written: {cfg.out}, of step {step}")


def merge(adapter: lora.LoraConfig, base: Params, low_rank: Params, base_is_there: bool) -> Params:
    """The decoder's parameters with the adapter merged into them, in float32."""
    if not base_is_there:
        log_info("the base is no longer in its directory: the checkpoint's copy of it is used")
        base = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    return lora.merge(adapter, base, low_rank)


if __name__ == "__main__":
    command_line.run(Config, main)
