"""Settings that nothing would read, as another one is not set: they are refused, so that no run is named after them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.common import settings

# Settings that are read only where another one is set.
READ_WITH = {
    "batches.packed_length": "batches.max_tokens_per_device",
    "weights.adapter.alpha": "weights.adapter.rank",
    "weights.adapter.targets": "weights.adapter.rank",
    "weights.adapter.use_rslora": "weights.adapter.rank",
    "weights.adapter.use_dora": "weights.adapter.rank",
    "weights.ref_mixup_alpha": "weights.ref_sync_steps",
    "controllers.kl_horizon": "controllers.kl_target",
    "controllers.entropy_delta": "controllers.entropy_target",
    "server.weights": "server.url",
    "server.max_gap": "server.url",
}
# Settings of sampling and of its agreement with the trainer.
OF_SAMPLING = ("weights.gather_for_generation", "weights.batch_invariant")
BLOCKS = {
    "batches": settings.Batches(),
    "weights": settings.Weights(),
    "controllers": settings.Controllers(),
    "server": settings.Server(),
}


def check_unread(cfg: Any, samples: bool = True) -> None:
    """Raise ValueError for settings of a recipe's Config that nothing reads, a line for each.

    A setting counts as given where it differs from its block's default. samples: whether the recipe samples.
    """
    unread = [] if samples else [f"{_shown(cfg, name)}: nothing is sampled here" for name in _given(cfg, OF_SAMPLING)]
    for name in _given(cfg, tuple(READ_WITH)):
        other = READ_WITH[name]
        if _value(cfg, other) == _value(BLOCKS, other):
            unread.append(f"{_shown(cfg, name)} is read only with --{other}")
    if unread:
        raise ValueError("\n".join(unread))


def _given(cfg: Any, names: Sequence[str]) -> list[str]:
    """Those of the names that the Config has, with another value than their block's default."""
    own = {field.name for field in dataclasses.fields(cfg)}
    return [name for name in names if name.split(".")[0] in own and _value(cfg, name) != _value(BLOCKS, name)]


def _value(cfg: Any, name: str) -> Any:
    for part in name.split("."):
        cfg = cfg[part] if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg


def _shown(cfg: Any, name: str) -> str:
    value = _value(cfg, name)
    return f"--{name}" if value is True else f"--{name} {value}"
