"""Sizes of published models: each a directory of experiments/model_shapes/ with a config.json and no weights."""

from pathlib import Path

from experiments.common import hub

SHAPES = Path(__file__).resolve().parents[1] / "model_shapes"


def find_shape(model: str) -> str:
    """The directory of a model's config.json: `model` itself, one of SHAPES, or OWNER/NAME of the hub.

    Raises ValueError, with the names of SHAPES, where it is none of these.
    """
    if Path(model).is_dir():
        return model
    if (SHAPES / model.lower()).is_dir() and "/" not in model:
        return str(SHAPES / model.lower())
    if hub.ON_HUB.fullmatch(model):
        return hub.find_model(model)
    names = ", ".join(sorted(path.name for path in SHAPES.iterdir()))
    raise ValueError(f"model {model!r}; legal: a directory with config.json, OWNER/NAME of the hub, or one of {names}")
