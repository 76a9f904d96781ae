"""The best model of a run so far, by a metric of its evaluations."""

import json
import math

from experiments.common.models import save_pretrained
from rljax.models.decoder import DecoderConfig
from rljax.models.hf import RewardKind
from rljax.train import distributed
from rljax.train.log import write_atomically
from rljax.train.run import Run
from rljax.types import TrainState


def keep_best(
    run: Run,
    state: TrainState,
    config: DecoderConfig,
    source: str,
    metric: str,
    value: float,
    lower_is_better: bool = False,
    reward_kind: RewardKind = "outcome",
) -> None:
    """Write the model as DIRECTORY/best unless an earlier evaluation was as good; best.json says which one that is.

    Called before the step is recorded, or after the last one: a run that is stopped in between evaluates that step
    again, and keeps the same. The time that it takes does not count as the step's.

    Args:
      source: the model directory from which config and tokenizer are copied (`save_pretrained`).
      metric, value: name and value of what the evaluation measured.
      reward_kind: of a reward model (`save_pretrained`).
    """
    record = run.directory / "best.json"
    step = int(state.step)

    def is_best() -> bool:
        if not record.is_file():
            return True
        best = json.loads(record.read_text())
        is_better = value < best["value"] if lower_is_better else value > best["value"]
        return is_better or math.isnan(best["value"]) or best["step"] == step

    with run.not_counted():
        if distributed.on_main("best model", is_best):
            place = run.directory / "best"
            save_pretrained(state.params, state.frozen, config, source, place, reward_kind=reward_kind)
            if distributed.is_main():
                write_atomically(record, json.dumps({"step": step, "metric": metric, "value": value}))
