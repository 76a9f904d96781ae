"""Models named OWNER/NAME, which huggingface_hub downloads into its cache."""

import dataclasses
import re
from pathlib import Path
from typing import TypeVar

from rljax.train.log import log_info

T = TypeVar("T")
ON_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # not the same weights in other formats
MODEL_FIELDS = ("model", "critic_model", "teacher")
SNAPSHOT = re.compile(r"models--[^/]+--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")


def find_model(model: str) -> str:
    """The directory of a model: `model` itself, or where it is OWNER/NAME[@REVISION], its snapshot in the hub's cache.

    What is in the cache is taken as it is, so a command that is run again finds the same weights; the directory's name
    is the revision. HF_HUB_OFFLINE=1 forbids the download. Raises FileNotFoundError, saying how to fetch the model.
    """
    named = ON_HUB.fullmatch(model)
    if Path(model).is_dir() or named is None:
        return model
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
    """The settings with directories for models that are named OWNER/NAME: a run's config.json holds their revision."""
    fields = {field.name for field in dataclasses.fields(config)} & set(MODEL_FIELDS)
    found = {name: find_model(getattr(config, name)) for name in fields if isinstance(getattr(config, name), str)}
    return dataclasses.replace(config, **found)


def model_name(model: str) -> str:
    """What a run is called after: the model's directory, or its name and the beginning of its revision on the hub."""
    directory = Path(model).resolve()
    on_hub = SNAPSHOT.search(directory.as_posix())
    return f"{on_hub['name']}-{on_hub['revision'][:8]}" if on_hub else directory.name
