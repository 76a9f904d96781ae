"""The files that a script's settings name to be read, and files that go on under the settings that began them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.common import data, hub
from experiments.common.verifiers import VERIFIERS
from rljax.data.files import HUB
from rljax.train.inputs import describe_changed_inputs, file_digests
from rljax.train.log import write_atomically
from rljax.train.report import changed_settings


def inputs_of(cfg: Any) -> list[str]:
    """The files and directories that a script's settings name to be read: models, reward models, rows, templates.

    What the hub has is not among them: config.json names its revision. All processes call it.
    """
    models = [value for name in hub.MODEL_FIELDS if isinstance(value := getattr(cfg, name, ""), str)]
    models += [hub.find_model(name) for name in _reward_models(cfg)]
    local = [model for model in models if hub.name_on_hub(model) == model]
    return sorted({name for name in (*local, *_files(cfg)) if name and Path(name).exists()})


def _reward_models(cfg: Any) -> Iterator[str]:
    names: list[str] = []
    for item in getattr(cfg, "rewards", ()):
        name, _, _ = hub.split_reward(item, names)
        names.append(name)
        if name not in VERIFIERS:
            yield hub.model_of_reward(name)


def _files(cfg: Any) -> Iterator[str]:
    rows = getattr(cfg, "data", ())
    for names in (getattr(cfg, "prompts", ()), rows if isinstance(rows, str) else getattr(rows, "files", ())):
        for name in [names] if isinstance(names, str) else names:
            path, _ = data.split_weight(name)
            if not path.startswith(HUB):
                yield path
    templates = (getattr(cfg, "template", ""), getattr(rows, "template", ""), getattr(rows, "completion", ""))
    yield from (text[1:] for text in templates if text.startswith("@"))
    if rubric := getattr(getattr(cfg, "reward", None), "rubric", ""):
        yield rubric


def keep_settings(record: Path, settings: dict, inputs: Sequence[str], what: str, option: str) -> None:
    """Keep the settings in a file, with digests of what is read. Raises ValueError, naming what differs, for others.

    Args: what: is kept under these settings, for the error. option: of the command line, which would name another.
    """
    now = {"config": json.loads(json.dumps(settings)), "inputs": file_digests(inputs)}
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(now, indent=1))
        return
    stored = json.loads(record.read_text(encoding="utf-8"))
    before = stored.get("config", stored)  # the settings alone, as earlier versions kept them
    if changed := changed_settings(before, now["config"]):
        raise ValueError(f"{what} of other settings: {changed}; legal: a new {option}, or these settings")
    if changed := describe_changed_inputs(record, stored.get("inputs", now["inputs"]), now["inputs"], option):
        raise ValueError(changed)
