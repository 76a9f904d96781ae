"""From a command line to a recipe's `main`, and what is set for the whole process."""

import contextlib
import dataclasses
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

from experiments.common import hub
from rljax.rewards.score import RewardError
from rljax.train.log import log_info

MORE = "Rarely needed settings that are not listed here: experiments/common/settings.py."


def run(config_type: type, main: Callable) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    Unknown names, wrong types and settings that are refused are one error that says what would be legal; the exit code
    is 2 where the command line could not be parsed, else 1. With --debug the traceback is shown.
    """
    config = parse(config_type)
    debug = getattr(config, "debug", False)
    configure_jax(debug)
    try:
        main(hub.with_local_models(config))
    except jax.errors.JaxRuntimeError:
        raise
    except (ValueError, ImportError, OSError, RuntimeError, RewardError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        log_info(f"error: {error}")
        raise SystemExit(1) from None


def parse(config_type: type):
    """The command line as a `config_type`. Exits after --help, and on an error with the list of legal flags."""
    description = f"{config_type.__doc__} {MORE}"
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config_type, description=description, config=(tyro.conf.FlagCreatePairsOff,), use_underscores=True
            )
    except SystemExit as stop:
        print(errors.getvalue(), end="", file=sys.stderr)
        if stop.code and "Unrecognized" in errors.getvalue():
            legal = "legal: " + " ".join(flags_of(config_type))
            print(textwrap.fill(legal, 100, break_on_hyphens=False), file=sys.stderr)
        raise


def flags_of(config_type: type, prefix: str = "--") -> list[str]:
    """Every flag, those of nested blocks by their dotted name."""
    flags = []
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            flags += flags_of(field.type, f"{prefix}{field.name}.")
        else:
            flags.append(prefix + field.name)
    return flags


def configure_jax(debug: bool = False) -> None:
    """Of the whole process: matmuls in float32, a persistent compilation cache, and debugging.

    The cache lies outside the checkout; RLJAX_CACHE moves it, and switches it off where it is empty.
    """
    cache = os.environ.get("RLJAX_CACHE", str(Path.home() / ".cache" / "rljax" / "xla"))
    if cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # The default is TF32 on GPUs and bfloat16 on TPUs, where sampler and trainer would no longer agree.
    jax.config.update("jax_default_matmul_precision", "float32")
    if debug:
        jax.config.update("jax_disable_jit", True)
        jax.config.update("jax_debug_nans", True)
