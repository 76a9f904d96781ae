"""Models named OWNER/NAME, which huggingface_hub downloads into its cache; and the revisions that a run keeps."""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rljax.train import distributed
from rljax.train.log import log_info

T = TypeVar("T")
ON_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # not the same weights in other formats
DATASET = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?=$|[/:=])")  # without a revision
LONGEST = 60  # characters of a model's name in that of a run
MODEL_FIELDS = ("model", "critic_model", "teacher")
SNAPSHOT = re.compile(r"(.*/)?models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")


def find_model(model: str) -> str:
    """The directory of a model: `model` itself, or where it is OWNER/NAME[@REVISION], its snapshot in the hub's cache.

    What is in the cache is taken as it is, so a command that is run again finds the same weights; the directory's name
    is the revision. Process 0 says which revision it is; all processes call it. HF_HUB_OFFLINE=1 forbids the download.
    Raises FileNotFoundError, saying how to fetch the model.
    """
    if ON_HUB.fullmatch(model) is None:
        return model
    found = distributed.on_main("find a model", lambda: model if Path(model).is_dir() else _snapshot(model))
    named = name_on_hub(found)
    return found if distributed.is_main() or named == found else _snapshot(named)


def name_on_hub(directory: str) -> str:
    """OWNER/NAME@REVISION of a snapshot in the hub's cache, wherever that lies; any other directory as it is."""
    snapshot = SNAPSHOT.fullmatch(Path(directory).as_posix())
    return "{owner}/{name}@{revision}".format(**snapshot.groupdict()) if snapshot else directory


def _snapshot(model: str) -> str:
    """The directory of OWNER/NAME[@REVISION] in the hub's cache, downloaded where it is not there."""
    named = ON_HUB.fullmatch(model)
    from huggingface_hub import snapshot_download  # half a second of import

    name, revision = named["name"], named["revision"]
    cached = _cached(name, revision)
    if cached is not None:
        return cached
    log_info(f"{model}: looked for on the hub")
    try:
        directory = snapshot_download(name, revision=revision, allow_patterns=list(FILES))
        if not _is_whole(directory):
            raise FileNotFoundError(f"{directory} lacks config.json or *.safetensors")
        return directory
    except Exception as error:  # of the network, of the hub, of a name that it refuses
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        pinned = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"no directory {model}, and it cannot be had from the hub ({reason}); where there is a network: "
            f"hf download {name}{pinned}"
        ) from None


def _cached(name: str, revision: str | None) -> str | None:
    """The whole snapshot of a model in the cache; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # not there, or no name that the hub has
        return None
    return directory if _is_whole(directory) else None


def _is_whole(directory: str) -> bool:
    return (Path(directory) / "config.json").is_file() and any(Path(directory).glob("*.safetensors"))


def with_local_models(config: T) -> T:
    """The settings with directories for models that are named OWNER/NAME."""
    found = {name: find_model(value) for name, value in _models_of(vars(config)).items()}
    return dataclasses.replace(config, **found)


def settings_of(config: Any) -> dict[str, Any]:
    """The settings as a run's config.json keeps them: models and data sets of the hub by name and revision.

    All processes call it.
    """
    settings = dataclasses.asdict(config)
    models = {name: name_on_hub(value) for name, value in _models_of(settings).items()}
    rewards = {"rewards": _pinned_rewards(settings["rewards"])} if settings.get("rewards") else {}
    rows = {name: _pinned_rows(settings[name]) for name in ("prompts", "data") if name in settings}
    return settings | models | rewards | rows


def split_reward(item: str, before: Collection[str]) -> tuple[str, str | None, str | None]:
    """NAME, WEIGHT and OTHER of a reward NAME=WEIGHT@OTHER, None where it is not there.

    Args: before: names of rewards that stand before it. What follows @ is OTHER where it is one of them, else it
      belongs to the name.
    """
    plain, at, other = item.rpartition("@")
    if not at or other not in before:
        plain, other = item, None
    name, equals, weight = plain.rpartition("=")
    return (name, weight, other) if equals else (plain, None, other)


def model_of_reward(name: str) -> str:
    """The model that a reward DIRECTORY or process:DIRECTORY names, as `find_model` takes it."""
    return name.removeprefix("process:")


def _pinned_rewards(rewards: Sequence[str]) -> list[str]:
    """The items of --rewards, those that name a model of the hub with its revision."""
    names: list[str] = []
    items = []
    for item in rewards:
        name, _, _ = split_reward(item, names)
        names.append(name)
        model = model_of_reward(name)
        place = name.removesuffix(model)
        items.append(place + name_on_hub(find_model(model)) + item.removeprefix(name))
    return items


def _pinned_rows(named: Any) -> Any:
    """The files of a setting, data sets of the hub with their revision."""
    if isinstance(named, dict):
        return named | {"files": _pinned_rows(named["files"])} if "files" in named else named
    if isinstance(named, str):
        found = DATASET.match(named)
        revision = found and distributed.on_main("find a data set", lambda: _dataset_revision(found[1]))
        return f"{found[0]}@{revision}{named[found.end() :]}" if revision else named
    return tuple(map(_pinned_rows, named))


def _dataset_revision(name: str) -> str:
    """The revision of a data set that was read: the newest in the cache, else the hub's; "" where neither is known."""
    from huggingface_hub import HfApi, constants

    snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots")
    if snapshots.is_dir() and (found := list(snapshots.iterdir())):
        return max(found, key=lambda snapshot: snapshot.stat().st_mtime).name
    try:
        return HfApi().dataset_info(name, timeout=10.0).sha or ""
    except Exception:  # of the network, of the hub: the run goes on without a pin
        return ""


def _models_of(settings: dict[str, Any]) -> dict[str, str]:
    return {name: settings[name] for name in MODEL_FIELDS if isinstance(settings.get(name), str)}


def model_name(model: str) -> str:
    """What a run is called after: the model's directory, or its name and the beginning of its revision on the hub.

    Every run writes its models as RUN/model and RUN/best: these are called RUN and RUN-best. Of a name of more than
    `LONGEST` characters (each iteration adds some) the end is replaced by a digest.
    """
    directory = Path(model).resolve()
    on_hub = SNAPSHOT.fullmatch(directory.as_posix())
    if on_hub:
        return f"{on_hub['name']}-{on_hub['revision'][:8]}"
    names = {"model": directory.parent.name, "best": f"{directory.parent.name}-best"}
    name = names.get(directory.name, directory.name)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{digest}"
