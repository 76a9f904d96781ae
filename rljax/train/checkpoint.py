"""Checkpoints of a whole TrainState: asynchronous, atomic, and verified. The only file that knows Orbax.

A step is good once its manifest (sha256 of every file) stands beside it; the manifest is written after Orbax has
committed the step. A step without one was interrupted and is removed at start; one that no longer matches is reported
and passed over for the one before it.
"""

import hashlib
import json
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

    def __init__(self, directory: str | Path, keep: int = 2, say: Callable[[str], None] = lambda text: None):
        self.directory = Path(directory).absolute()  # Orbax fails on a relative path, and only in its thread
        self.directory.mkdir(parents=True, exist_ok=True)
        self.say = say
        for leftover in self.directory.iterdir():
            ours = leftover.name.isdigit() or ".orbax-checkpoint-tmp" in leftover.name
            if ours and not self._manifest(leftover.name).is_file():
                say(f"removing {leftover}: its saving was interrupted")
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
            damage = self._damage(step)
            if damage is None:
                for bad in damaged:
                    self._manifest(bad).unlink()  # first: without one, what is left of the step is removed at start
                    self._manager.delete(bad)
                return self._read(step, state)
            self.say(f"checkpoint {step} is damaged ({damage}); falling back to the one before")
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

    def _manifest(self, step: int | str) -> Path:
        return self.directory / f"{step}.sha256.json"

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        text = json.dumps(_digests(self.directory / str(step)), indent=1)
        temporary = self._manifest(step).with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._manifest(step))
        kept = {str(s) for s in self._manager.all_steps()}
        for manifest in self.directory.glob("*.sha256.json"):
            if manifest.name.split(".")[0] not in kept:
                manifest.unlink()

    def _damage(self, step: int) -> str | None:
        """What differs from the manifest, or None."""
        try:
            wanted = json.loads(self._manifest(step).read_text())
        except ValueError:
            return "its manifest is no JSON"
        found = _digests(self.directory / str(step))
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
