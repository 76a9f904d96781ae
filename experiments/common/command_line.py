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
from typing import Annotated, Any

import jax
import tyro

from experiments.common import hub
from experiments.common.settings import Hosts, Rare, Tracker
from rljax.envs.text import TextEnvError
from rljax.rewards.score import RewardError
from rljax.train import distributed, trackers
from rljax.train.log import log_error, silence
from rljax.train.provenance import source_digest
from rljax.train.report import flatten_settings
from rljax.train.watchdog import EXIT_CODE

Quiet = Annotated[Rare[bool], tyro.conf.arg(help="print nothing but errors")]
MORE = "Rarely needed settings that are not listed here: experiments/common/settings.py."

# What a user can mend; everything else is a bug, whose traceback is shown.
REFUSALS = (ValueError, ImportError, OSError, RuntimeError, RewardError, TextEnvError, FloatingPointError)


def run(config_type: type, main: Callable, one_process: bool = False, makes_run: bool = True) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    Where several processes run the script, they find each other first, and make sure that settings and code are the
    same on all. What one of them cannot go on with ends all of them. A script that is not made for several says so
    (`one_process`), and so does one that makes no run, whose metrics --tracker could send somewhere (`makes_run`).

    Unknown names, wrong types and settings that are refused are one error that says what would be legal; the exit code
    is 2 where the command line could not be parsed, 75 where another process was lost, else 1. With --debug the
    traceback is shown.
    """
    flags = parse(config_type, makes_run)
    config, hosts = flags.config, flags.hosts
    if makes_run:
        os.environ[trackers.VARIABLE] = flags.tracker
    if flags.quiet:
        silence()
    debug = getattr(config, "debug", False)
    configure_jax(debug)
    try:
        if one_process:
            refuse_several(hosts)
        distributed.initialize(**dataclasses.asdict(hosts))
        distributed.agree(facts_of(config))
        main(hub.with_local_models(config))
    except Exception as error:
        if distributed.is_lost_process(error):
            distributed.wait_for_reason()
            log_error(f"{str(error).splitlines()[0]}; exit code {EXIT_CODE}, run the same command again to resume")
            distributed.leave(EXIT_CODE)
        is_refusal = isinstance(error, REFUSALS) and not isinstance(error, jax.errors.JaxRuntimeError)
        if debug or not is_refusal:
            traceback.print_exc()
        if is_refusal:
            log_error(str(error))
        distributed.stop_others(str(error) if is_refusal else f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def refuse_several(hosts: Hosts) -> None:
    """Raise ValueError where this is one of several processes."""
    found = distributed.find_cluster(hosts.coordinator, hosts.processes, hosts.process)
    if found is not None:
        raise ValueError(
            f"this script runs in one process, and this one is number {found.process} of {found.processes}; "
            "legal: start it once, with --hosts.processes 1"
        )


def facts_of(config: Any) -> dict[str, Any]:
    """What must be the same on every process of a run: the settings, the code and the version of JAX."""
    settings = {f"--{name}": value for name, value in flatten_settings(dataclasses.asdict(config)).items()}
    return {**settings, "code (sha256 of the sources)": source_digest(), "jax": jax.__version__}


def parse(config_type: type, makes_run: bool = True) -> Any:
    """The command line: `config`, a `config_type`; what every script has, `hosts` and `quiet`; with a run `tracker`.

    Exits after --help, and on an error with the list of legal flags.
    """
    description = f"{config_type.__doc__} {MORE}"
    of_script = Annotated[config_type, tyro.conf.arg(name="")]
    shared: list[tuple] = [("hosts", Hosts, Hosts()), ("quiet", Quiet, False)]
    legal = [*flags_of(config_type), *flags_of(Hosts, "--hosts."), "--quiet"]
    if makes_run:
        shared.append(("tracker", Tracker, os.environ.get(trackers.VARIABLE) or "none"))
        legal.append("--tracker")
    flags = dataclasses.make_dataclass("Flags", [("config", of_script), *shared], frozen=True)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                flags, description=description, config=(tyro.conf.FlagCreatePairsOff,), use_underscores=True
            )
    except SystemExit as stop:
        if stop.code and "Unrecognized" in errors.getvalue():
            print(textwrap.fill("legal: " + " ".join(legal), 100, break_on_hyphens=False), file=sys.stderr)
        print(errors.getvalue(), end="", file=sys.stderr)  # last: it says which flag was perhaps meant
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


def changed_flags(settings: Any, defaults: Any, prefix: str = "--") -> list[str]:
    """The arguments of a command line that turn `defaults` into `settings`, as far as both have the same fields."""
    arguments = []
    for field in dataclasses.fields(defaults):
        value, usual = getattr(settings, field.name, None), getattr(defaults, field.name)
        if not hasattr(settings, field.name) or value == usual:
            continue
        if dataclasses.is_dataclass(value):
            arguments += changed_flags(value, usual, f"{prefix}{field.name}.")
        elif value is True:
            arguments.append(prefix + field.name)
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [prefix + field.name, *map(str, values)]
    return arguments


def configure_jax(debug: bool = False) -> None:
    """Of the whole process: matmuls in float32, a persistent compilation cache, and debugging.

    The cache lies outside the checkout; RLJAX_CACHE moves it, and switches it off where it is empty.
    """
    cache = os.environ.get("RLJAX_CACHE", str(Path.home() / ".cache" / "rljax" / "xla"))
    if cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    multiply_in_float32()
    if debug:
        jax.config.update("jax_disable_jit", True)
        jax.config.update("jax_debug_nans", True)


def multiply_in_float32() -> None:
    """Products of float32 arrays, in the whole process.

    The default is TF32 on GPUs and bfloat16 on TPUs, where sampler and trainer would no longer agree.
    """
    jax.config.update("jax_default_matmul_precision", "float32")
