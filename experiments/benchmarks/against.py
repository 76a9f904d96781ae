"""Peers: other trainers of language models, each in an environment and a process of its own, taking turns with ours.

Benchmarks take `--against tunix trl`. The first time that makes an environment for each peer under
~/.cache/rljax/peers, with pip and the versions below; later runs use it again, and deleting the folder is how to be rid
of it. A peer runs its own code (peers/*_worker.py) whenever it is asked to, and waits while the others are timed.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from experiments.benchmarks.common import Workload
from rljax.models.decoder import DecoderConfig
from rljax.train.log import log_info

FOLDER = Path.home() / ".cache" / "rljax" / "peers"
TORCH_FOR_CPUS = "https://download.pytorch.org/whl/cpu"

PeerName = Literal["tunix", "trl"]
Unit = Literal["rollout", "update", "grpo_step", "sft", "dpo"]  # what a peer can be asked to do
Work = Callable[[int], object]  # does something once, for the i-th time


class Peer(NamedTuple):
    """What to install, and how figures name it."""

    title: str
    python: str  # version it runs on
    packages: tuple[str, ...]
    size: str  # of the environment on disk


PEERS = {
    "tunix": Peer("Tunix", "3.12", ("google-tunix==0.1.7", "jax==0.12.0.1", "flax==0.12.12"), "1.5 GB"),
    "trl": Peer("TRL", "3.11", ("trl==1.16.0", "transformers==5.24.0", "torch==2.13.0"), "1.5 GB (torch for CPUs)"),
}
# Runs at the beginning of a turn that are not timed. A trainer's steps follow one another, but the first after another
# process's turn finds cold memory, and Tunix gives back that of its update after the results are there.
UNTIMED = 1
SHAPE = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")


@contextlib.contextmanager
def peer_works(names: Iterable[PeerName], unit: Unit, workload: Workload) -> Iterator[dict[str, Work]]:
    """{title: work}, each of which does one unit of work and returns when it is done. The peers end with the block.

    Raises ValueError where the workload is not in float32 on a CPU, as theirs is.
    """
    names = tuple(names)
    require_conditions_of_peers(names, workload.config)
    with contextlib.ExitStack() as stack:
        works = {}
        for name in names:
            script = Path(__file__).with_name("peers") / f"{name}_worker.py"
            works[PEERS[name].title] = stack.enter_context(worker(environment(name), script, unit, sizes_of(workload)))
        yield works


def require_conditions_of_peers(names: Iterable[str], config: DecoderConfig) -> None:
    """Raise ValueError where a ratio to one of these would compare dtypes or devices."""
    ours = f"{config.dtype} on a {jax.default_backend()}"
    if ours != "float32 on a cpu" and (names := ", ".join(names)):
        raise ValueError(
            f"{names}: peers run in float32 on CPUs, and this benchmark would run in {ours}; legal: without them, or "
            "float32 with JAX_PLATFORMS=cpu"
        )


@contextlib.contextmanager
def worker(python: Path, script: Path, unit: Unit, sizes: dict[str, int]) -> Iterator[Work]:
    """work(i): one unit of work of the script, which runs as long as the block and does nothing unless asked to."""
    command = [str(python), str(script), json.dumps({"unit": unit, **sizes})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:

        def work(_) -> None:
            answer = b""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(b"\n")
                answer = child.stdout.readline()  # the seconds that it took
            if not answer:
                raise ValueError(f"{script.name} ended in {unit}; its message stands above")
            float(answer)

        yield work


def sizes_of(workload: Workload) -> dict[str, int]:
    """The workload as the scripts take it."""
    shape = {field: getattr(workload.config, field) for field in SHAPE}
    lengths = {"length": workload.prompt_tokens, "completion": workload.completion_tokens}
    return shape | lengths | {"prompts": workload.prompts, "n": workload.n}


# ------------------------------------------------------------------------------------------------- environments


def environment(name: PeerName) -> Path:
    """The Python of the peer's environment, which is made where it is not there yet."""
    peer = PEERS[name]
    folder = FOLDER / name
    python = folder / "bin" / "python"
    stamp = folder / "packages.txt"  # written last: an interrupted install is taken up again
    packages = "\n".join(peer.packages)
    if stamp.exists() and stamp.read_text() == packages:
        return python
    log_info(f"making an environment for {peer.title} in {folder}: {', '.join(peer.packages)} and what they need")
    log_info(f"this takes minutes and {peer.size} of disk, once; delete the folder to be rid of it")
    subprocess.run([interpreter(peer.python), "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for package in peer.packages:
        if package.startswith("torch=="):  # without CUDA, if that index can be reached; else as PyPI has it
            subprocess.run([*pip, "--retries", "1", "--no-deps", "--index-url", TORCH_FOR_CPUS, package], check=False)
    subprocess.run([*pip, *peer.packages], check=True)
    stamp.write_text(packages)
    return python


def interpreter(version: str) -> str:
    """A Python of this version. Raises ValueError where there is none."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    command = f"python{version}"
    try:
        subprocess.run([command, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"this peer needs Python {version}, and `{command}` does not run here") from None
    return command
