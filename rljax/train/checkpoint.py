"""Checkpoints of a whole TrainState: asynchronous, atomic, and verified. The only file that knows Orbax.

Orbax commits a step by renaming its directory; what it did not commit is removed at the next start. The manifest
(sha256 of every file) is written after that, for which the whole step is read once more. A step that no longer matches
its manifest is reported and skipped for the one before it. A step without one was interrupted in between: it is
restored if Orbax can read it, which is said, and then gets its manifest.

Where several processes run, all call every function here: each writes its part of the arrays and computes the digests
of some files; process 0 writes the manifest and moves what is damaged aside. A checkpoint may be read by another number
of processes and into other shardings.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rljax.train import distributed
from rljax.train.watchdog import sign_of_life
from rljax.types import TrainState


class Checkpoints:
    """The checkpoints in one directory, of which the newest `keep` stay. `log_info` prints what was found damaged."""

    def __init__(self, directory: str | Path, keep: int = 2, log_info: Callable[[str], None] = lambda text: None):
        self.directory = Path(directory).absolute()  # Orbax fails on a relative path, and only in its thread
        self.log_info = log_info
        distributed.on_main("remove what was left half saved", self._remove_leftovers)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._manager.reached_preemption = lambda step: False  # it would ask JAX: `distributed.reached_preemption`
        self._hasher = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def _remove_leftovers(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
            self.log_info(f"removing {leftover}: its saving was interrupted")
            shutil.rmtree(leftover)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving; returns once the arrays are copied off the devices, so that their buffers may be donated."""
        self.wait()
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        if not self._manager.save(step, args=ocp.args.Composite(**items)):
            raise RuntimeError(f"{self.directory}: step {step} was not saved; steps there: {self._manager.all_steps()}")
        self._pending = self._hasher.submit(self._write_manifest, step)

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest undamaged state, in the shapes, dtypes and shardings of `state`; None without a checkpoint.

        Where there is one, the parameters and the statistics of `state` are deleted before it is read, even where
        other names refer to them: there is no room for both.
        Raises RuntimeError where there are checkpoints and all are damaged: starting over would lose them. Raises
        ValueError, naming a parameter that differs, where they are of another model.
        """
        self.wait()
        damaged = []
        steps = distributed.on_main("steps", lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            if distributed.on_main("manifest", _manifest(self.directory, step).is_file):
                damage = _find_damage(self.directory, step)
                restored = self._read(step, state) if damage is None else None
            else:
                restored, damage = self._read_unverified(step, state)
            if restored is not None:
                for damaged_step in damaged:
                    distributed.on_main("move a damaged checkpoint", partial(self._move_aside, damaged_step))
                    with _quiet_absl():  # Orbax finds nothing to delete, and forgets the step
                        self._manager.delete(damaged_step)
                return restored
            self.log_info(f"checkpoint {step} is damaged ({damage}); falling back to the one before")
            damaged.append(step)
        if damaged:
            raise RuntimeError(f"{self.directory}: all checkpoints are damaged; move the run away to start over")
        return None

    def _move_aside(self, step: int) -> None:
        """Make room for this step to be saved again. What is there may have been unreadable for a moment only."""
        others = (self.directory / f"{step}.damaged.{number}" for number in itertools.count(2))
        places = itertools.chain([self.directory / f"{step}.damaged"], others)
        place = next(place for place in places if not place.exists())
        os.rename(self.directory / str(step), place)
        if _manifest(self.directory, step).is_file():
            os.rename(_manifest(self.directory, step), place / "sha256.json")
        self.log_info(f"checkpoint {step} is kept as {place}: remove it when you no longer want it")

    def wait(self) -> None:
        """Wait until the last save is committed and has its manifest; raises what its thread raised."""
        pending = self._pending
        self._pending = None
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
        difference = _find_difference(self.directory / str(step), state)  # what Orbax says names no parameter
        if difference:
            raise OtherModelError(
                f"{self.directory.parent} holds a checkpoint of another model: {difference}; "
                "legal: the model that the run began with, or another directory"
            )
        for leaf in jax.tree.leaves((state.params, state.opt_state, state.frozen)):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        found = self._manager.restore(step, args=ocp.args.Composite(**targets))
        found = {name: found[name] for name in targets}
        return state.replace(**found.pop("rest"), **found)

    def _read_unverified(self, step: int, state: TrainState) -> tuple[TrainState | None, str | None]:
        """The state of a committed step without a manifest, which it gets; or why Orbax cannot read it."""
        restored, problem = None, None
        try:
            restored = self._read(step, state)
        except OtherModelError:
            raise
        except Exception as error:  # Orbax names no type for what is missing or broken
            problem = f"it has no manifest and cannot be read: {type(error).__name__}: {error}"
        problem = next(filter(None, distributed.exchange("unverified checkpoint", problem)), None)
        if problem is not None:
            return None, problem
        self.log_info(f"checkpoint {step} has no manifest: it is restored as Orbax committed it, and now gets one")
        self._pending = self._hasher.submit(self._write_manifest, step)
        return restored, None

    def _write_manifest(self, step: int) -> None:
        self._manager.wait_until_finished()
        text = json.dumps(_digests(self.directory / str(step)), indent=1)
        if not distributed.is_main():
            return
        manifest = _manifest(self.directory, step)
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, manifest)
        kept = {str(s) for s in self._manager.all_steps()}
        for manifest in self.directory.glob("*.sha256.json"):
            if manifest.name.split(".")[0] not in kept:
                manifest.unlink(missing_ok=True)  # `restore` may be moving it


class OtherModelError(ValueError):
    """A checkpoint is of another model."""


def restore_items(directory: str | Path, *names: str, step: int | None = None) -> tuple[int, dict]:
    """Items of a saved state ("params", "frozen") by name, on the CPU, whatever mesh they were saved from.

    step: None is the newest undamaged one that has a manifest. The directory is only read, so its run may continue.
    Raises FileNotFoundError where there is no such step, RuntimeError where it is damaged.
    """
    directory = Path(directory).absolute()
    steps = sorted((int(file.name.split(".")[0]) for file in directory.glob("*.sha256.json")), reverse=True)
    wanted = steps if step is None else [s for s in steps if s == step]
    if not wanted:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; legal: {steps}")
    undamaged = next((s for s in wanted if _find_damage(directory, s) is None), None)
    if undamaged is None:
        raise RuntimeError(f"{directory}: checkpoint {wanted[0]} is damaged: {_find_damage(directory, wanted[0])}")
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    items = {}
    with _quiet_absl(), ocp.StandardCheckpointer() as checkpointer:
        for name in names:
            folder = directory / str(undamaged) / name
            if not folder.is_dir():  # an empty item is not written
                items[name] = {}
                continue
            shapes = checkpointer.metadata(folder).item_metadata.tree
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), shapes)
            items[name] = _with_integer_keys(checkpointer.restore(folder, target))
    return undamaged, items


def _find_difference(folder: Path, state: TrainState) -> str | None:
    """The first parameter whose shape differs from the stored one, or None."""
    for name in ("params", "frozen"):
        stored = {}
        if (folder / name).is_dir():
            with _quiet_absl(), ocp.StandardCheckpointer() as checkpointer:
                tree = _with_integer_keys(checkpointer.metadata(folder / name).item_metadata.tree)
            stored = _shapes(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
        wanted = _shapes(getattr(state, name))
        for path in sorted(stored.keys() | wanted.keys()):
            if stored.get(path) != wanted.get(path):
                return f"{name}/{path} is {stored.get(path, 'absent')} there and {wanted.get(path, 'absent')} here"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


@contextlib.contextmanager
def _quiet_absl():
    """Silence Orbax's warning of a file that a checkpoint manager does not write for each item."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _with_integer_keys(tree: Any) -> Any:
    """The tree with integers for keys of digits: Orbax stores all keys as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(name) if name.isdigit() else name: _with_integer_keys(value) for name, value in tree.items()}


def _manifest(directory: Path, step: int | str) -> Path:
    return directory / f"{step}.sha256.json"


def _find_damage(directory: Path, step: int) -> str | None:
    """What differs from the manifest, or None."""
    try:
        wanted = json.loads(_manifest(directory, step).read_text())
    except ValueError:
        return "its manifest is no JSON"
    found = _digests(directory / str(step))
    changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return f"{len(changed)} files differ from its manifest, first {changed[0]}" if changed else None


def _items(state: TrainState) -> dict:
    """The state as separate items, so that parameters can be restored alone."""
    items = {name: getattr(state, name) for name in ("params", "opt_state", "frozen")}
    items["rest"] = {name: value for name, value in vars(state).items() if name not in items}
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}  # Orbax refuses an empty item


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    if not isinstance(leaf, jax.Array):
        leaf = jax.numpy.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digest(file: Path) -> str:
    sign_of_life()
    with open(file, "rb") as source:  # of gigabytes: not all of it in memory
        return hashlib.file_digest(source, "sha256").hexdigest()


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, by its path inside the directory. Each process reads some of the files."""

    def names() -> list[str]:
        return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())

    def digests_of(own: np.ndarray) -> list[str]:
        return [_digest(directory / files[i]) for i in own]

    files = distributed.on_main("files of a checkpoint", names)
    digests = distributed.share_rows(digests_of, np.arange(len(files)), "digests")
    return dict(zip(files, digests, strict=True))
