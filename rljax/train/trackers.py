"""Metrics in wandb or trackio as well, where `RLJAX_TRACKER` (`--tracker` of every script) names one of them.

metrics.jsonl, TensorBoard and the report are written anyway; a tracker is where a person looks, not part of the
experiment, so it stands in no config.json and a resumed run may take another. The id of a run there is kept in
RUN/trackers.json: a run that is resumed goes on in its own curves. Settings of the tracker are its own environment
variables: WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR ...
"""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rljax.train.log import MetricsWriter, write_atomically

VARIABLE = "RLJAX_TRACKER"
PROJECT = "rljax"


class Tracker(NamedTuple):
    """An open run of a tracker."""

    write: MetricsWriter
    close: Callable[[], None]


def open_tracker(directory: Path, config: dict[str, Any]) -> Tracker | None:
    """The tracker that the environment names, on the run of this directory; None where it names none.

    Raises ValueError for another name, ImportError where its package is not installed, and RuntimeError where it
    cannot begin (wandb without a login).
    """
    name = os.environ.get(VARIABLE, "") or "none"
    if name == "none":
        return None
    if name not in OPENERS:
        raise ValueError(f"tracker {name!r} in {VARIABLE}; legal: none, {', '.join(OPENERS)}")
    try:
        return OPENERS[name](directory, config, run_id(directory, name))
    except ImportError:
        raise ImportError(f"{name} is not installed: pip install 'rljax[trackers]'") from None
    except Exception as error:  # of any kind: each tracker has its own
        raise RuntimeError(f"{name} cannot begin a run ({error}); legal without it: --tracker none") from error


def run_id(directory: Path, name: str) -> str:
    """The id of the directory's run in that tracker: the one that is kept there, or a new one."""
    path = directory / "trackers.json"
    ids = json.loads(path.read_text()) if path.is_file() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        write_atomically(path, json.dumps(ids))
    return ids[name]


def _open_wandb(directory: Path, config: dict[str, Any], run_id: str) -> Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run_id,
        name=directory.name,
        dir=directory,
        config=config,
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    return Tracker(lambda step, metrics: run.log(metrics, step=step), run.finish)


def _open_trackio(directory: Path, config: dict[str, Any], run_id: str) -> Tracker:
    import trackio

    # trackio tells runs apart by their names
    run = trackio.init(project=PROJECT, name=f"{directory.name}-{run_id}", config=config, resume="allow", embed=False)
    return Tracker(lambda step, metrics: run.log(metrics, step=step), run.finish)


OPENERS = {"wandb": _open_wandb, "trackio": _open_trackio}
