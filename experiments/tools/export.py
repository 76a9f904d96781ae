r"""A checkpoint as a Hugging Face model directory that transformers loads.

    python experiments/export.py --run runs/grpo/DIR --out exported
    python experiments/export.py --run runs/grpo/DIR --out adapter --adapter separate     # PEFT's format
    python experiments/export.py --run runs/grpo/DIR --out exported --step 20 --dtype bfloat16

Weights with their index, config, tokenizer, chat template, generation config. All of it is done on the CPU; an
interrupted export leaves no half directory. An adapter is merged in float32 into the model that it was trained on, if
that still lies where it did, else into the checkpoint's copy, which has the precision of the computation.

Reached: both ways transformers and peft load the same bits (tests/test_export.py, tests/models/test_peft.py).
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

import options
from rljax.models import decoder, hf, lora, peft
from rljax.train.checkpoint import restore_items
from rljax.train.log import log_info
from rljax.types import Params


@dataclasses.dataclass(frozen=True)
class Config:
    """Which checkpoint, and where to."""

    run: str  # a run directory
    out: str  # the directory to write; must not hold anything
    step: int = 0  # of the checkpoint; 0: the newest good one
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # of the weights; default: what the model came in
    adapter: Literal["merged", "separate"] = "merged"  # into the weights, or alone in PEFT's format
    shard_gigabytes: float = 5.0  # the largest file


def main(cfg: Config) -> None:
    about = Path(cfg.run) / "model"
    if not about.is_dir():
        raise ValueError(f"{cfg.run} is no run directory of a language model: it has no model/config.json")
    config, (adapter, base) = hf.read_config(about), hf.read_adapter(about)
    if cfg.adapter == "separate" and adapter is None:
        raise ValueError(f"{cfg.run} trained no adapter; legal: --adapter merged")
    here = base != about  # the model that an adapter is of, where it was: the checkpoint's copy need not be read
    needed = ("params",) if cfg.adapter == "separate" or here else ("params", "frozen")
    step, parts = restore_items(Path(cfg.run) / "checkpoints", *needed, step=cfg.step or None)
    trained = dict(parts["params"])
    low_rank, head = trained.pop("lora", None), trained.get("score_head")
    if cfg.adapter == "separate":
        peft.save_adapter(cfg.out, dataclasses.replace(config, adapter=adapter), low_rank, base)
    else:
        params = hf.load(base, config) if here else decoder.full_params(config, trained, parts["frozen"])["decoder"]
        if low_rank is not None:
            params = merged(adapter, params, low_rank, here)
        hf.save(cfg.out, config, params, about, cfg.dtype or None, int(cfg.shard_gigabytes * 10**9), head)
    log_info(f"written: {cfg.out}, of step {step}")


def merged(adapter: lora.LoraConfig, base: Params, low_rank: Params, here: bool) -> Params:
    """The decoder's parameters with the adapter in them, in float32."""
    if not here:
        log_info("the base is no longer where it was: the checkpoint's copy of it is taken")
        base = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    return lora.merge(adapter, base, low_rank)


if __name__ == "__main__":
    options.run(Config, main)
