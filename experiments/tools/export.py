r"""A checkpoint as a Hugging Face model directory that transformers loads. Of the last step, a run writes one itself.

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

from experiments.common import command_line
from experiments.common.models import save_pretrained
from rljax.models import hf, peft
from rljax.models.stacks import are_stacked
from rljax.train.checkpoint import restore_items
from rljax.train.log import log_info


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
    model_files = Path(cfg.run) / "model_files"
    if not model_files.is_dir():
        raise ValueError(f"{cfg.run} is no run directory of a language model: it has no model_files/config.json")
    adapter, base_directory = hf.read_adapter(model_files)
    config = dataclasses.replace(hf.read_config(model_files, reward_model=True), adapter=adapter)
    separate = cfg.adapter == "separate"
    if separate and adapter is None:
        raise ValueError(f"{cfg.run} trained no adapter; legal: --adapter merged")

    # The checkpoint's copy of a base need not be read where the base is still in its own directory.
    base_is_there = base_directory != model_files
    needed = ("params",) if separate or base_is_there else ("params", "frozen")
    step, parts = restore_items(Path(cfg.run) / "checkpoints", *needed, step=cfg.step or None)
    config = dataclasses.replace(config, scan_layers=are_stacked(parts["params"]))
    if separate and "score_head" in parts["params"]:
        raise ValueError(
            f"{cfg.run} trained a score head, which an adapter's files do not hold; legal: --adapter merged"
        )
    if separate:
        peft.save_adapter(cfg.out, config, parts["params"]["lora"], base_directory)
    else:
        if adapter is not None and not base_is_there:
            log_info("the base is no longer in its directory: the checkpoint's copy of it is used")
        save_pretrained(
            parts["params"],
            parts.get("frozen", {}),
            config,
            base_directory,
            cfg.out,
            dtype=cfg.dtype or None,
            shard_bytes=int(cfg.shard_gigabytes * 10**9),
            replace=False,
            reward_kind=hf.reward_kind(model_files) or "outcome",
        )
    log_info(f"written: {cfg.out}, of step {step}")


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
