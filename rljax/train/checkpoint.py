"""Checkpoints of a whole TrainState: asynchronous, atomic, and verified. The only file that knows Orbax.

A step is good once its manifest (sha256 of every file) stands beside it; the manifest is written after Orbax has
committed the step. A step without one was interrupted and is removed at start; one that no longer matches is reported
and passed over for the one before it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from rljax.types import TrainState


class Checkpoints:
    """The checkpoints under one directory: the newest `keep` good ones stay."""

    def __init__(self, directory: str | Path, keep: int = 2, log_info: Callable[[str], None] = lambda text: None):
        self.directory = Path(directory).absolute()  # Orbax fails on a relative path, and only in its thread
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log_info = log_info
        for leftover in self.directory.iterdir():
            ours = leftover.name.isdigit() or ".orbax-checkpoint-tmp" in leftover.name
            if ours and not _manifest(self.directory, leftover.name).is_file():
                log_info(f"removing {leftover}: its saving was interrupted")
                shutil.rmtree(leftover)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._hasher = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Begin saving; returns once the arrays are copied off the devices, so their buffers may be donated."""
        self.wait()
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        if not self._manager.save(step, args=ocp.args.Composite(**items)):
            raise RuntimeError(f"{self.directory}: step {step} was not saved; steps there: {self._manager.all_steps()}")
        self._pending = self._hasher.submit(self._seal, step)

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest good state, in the shapes, dtypes and shardings of `state`; None where there is no checkpoint.

        Raises RuntimeError where there are checkpoints and none is good: starting over would lose them.
        """
        self.wait()
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage = _damage(self.directory, step)
            if damage is None:
                for bad in damaged:
                    _manifest(
                        self.directory, bad
                    ).unlink()  # first: without one, what is left of the step is removed at start
                    self._manager.delete(bad)
                return self._read(step, state)
            self.log_info(f"checkpoint {step} is damaged ({damage}); falling back to the one before")
            damaged.append(step)
        if damaged:
            raise RuntimeError(f"{self.directory}: no checkpoint is good; move the run directory away to start over")
        return None

    def wait(self) -> None:
        """Until the last save is committed and sealed; raises what went wrong in its thread."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._hasher.shutdown()
            self._manager.close()

    def _read(self, step: int, state: TrainState) -> TrainState:
        targets = {name: ocp.args.StandardRestore(jax.tree.map(_target, item)) for name, item in _items(state).items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**targets))
        found = {name: found[name] for name in targets}
        return state.replace(**found.pop("rest"), **found)

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        text = json.dumps(_digests(self.directory / str(step)), indent=1)
        manifest = _manifest(self.directory, step)
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, manifest)
        kept = {str(s) for s in self._manager.all_steps()}
        for manifest in self.directory.glob("*.sha256.json"):
            if manifest.name.split(".")[0] not in kept:
                manifest.unlink()


def restore_items(directory: str | Path, *names: str, step: int | None = None) -> tuple[int, dict]:
    """Parts of a saved state ("params", "frozen") by name, on the CPU, whatever mesh they were saved from.

    step: None is the newest good one. Nothing is changed, so a run may go on meanwhile. Raises FileNotFoundError where
    there is no such step, RuntimeError where it is damaged.
    """
    directory = Path(directory).absolute()
    steps = sorted((int(file.name.split(".")[0]) for file in directory.glob("*.sha256.json")), reverse=True)
    wanted = steps if step is None else [s for s in steps if s == step]
    if not wanted:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; legal: {steps}")
    good = next((s for s in wanted if _damage(directory, s) is None), None)
    if good is None:
        raise RuntimeError(f"{directory}: checkpoint {wanted[0]} is damaged: {_damage(directory, wanted[0])}")
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    parts = {}
    with _quiet_absl(), ocp.StandardCheckpointer() as checkpointer:
        for name in names:
            item = directory / str(good) / name
            if not item.is_dir():  # an empty one is not written
                parts[name] = {}
                continue
            shapes = checkpointer.metadata(item).item_metadata.tree
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
            parts[name] = _numbered(checkpointer.restore(item, target))
    return good, parts


@contextlib.contextmanager
def _quiet_absl():
    """Orbax warns of a file that a checkpoint manager does not write for each item."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _numbered(tree):
    """Keys that were integers: Orbax's own tree has them as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(name) if name.isdigit() else name: _numbered(value) for name, value in tree.items()}


def _manifest(directory: Path, step: int | str) -> Path:
    return directory / f"{step}.sha256.json"


def _damage(directory: Path, step: int) -> str | None:
    """What differs from the manifest, or None."""
    try:
        wanted = json.loads(_manifest(directory, step).read_text())
    except ValueError:
        return "its manifest is no JSON"
    found = _digests(directory / str(step))
    changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return f"{len(changed)} files differ from its manifest, first {changed[0]}" if changed else None


def _items(state: TrainState) -> dict:
    """Saved apart, so that parameters can be restored alone."""
    items = {name: getattr(state, name) for name in ("params", "opt_state", "frozen")}
    items["rest"] = {name: value for name, value in vars(state).items() if name not in items}
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}  # Orbax refuses an empty item


def _target(leaf):
    leaf = leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, by its path inside the directory."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
