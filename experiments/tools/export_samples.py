"""The samples and transcripts of a run in others' formats, for their viewers.

    python experiments/tools/export_samples.py --run RUN --format inspect --out logs    # inspect view --log-dir logs
    python experiments/tools/export_samples.py --run RUN --format atif --out trajectories    # a file a completion

inspect: one log of UK AISI's Inspect (version 2 of its JSON format). A sample is a prompt at a step, an epoch is one of
its completions, in the order of samples.jsonl; verifiers and reward are its scores, log-probs those of the sampler.
atif: the Agent Trajectory Interchange Format (1.7) of the Harbor project: token ids and log-probs of each turn, what
the environment added as its observation. Neither package is needed to write them (extra `viewers`: their readers, for
the test).

Reached: read back by inspect-ai 0.3.285 and harbor 0.26.0 (tests/test_export_samples.py).
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.common import command_line
from rljax.train.log import log_info, read_records, write_atomically

ATIF_VERSION = "ATIF-v1.7"
EPOCH_ZERO = "1970-01-01T00:00:00+00:00"  # a run does not record when it began


@dataclasses.dataclass(frozen=True)
class Config:
    """Which samples are written where."""

    run: str  # directory of a run
    format: Literal["inspect", "atif"] = "inspect"  # whose
    out: str = "exported"  # directory for the files
    steps: tuple[int, ...] = ()  # sampled steps; default: all


def main(cfg: Config) -> list[Path]:
    """Write the files; return their paths."""
    directory = Path(cfg.run)
    records = [
        record for record in read_records(directory / "samples.jsonl") if not cfg.steps or record["step"] in cfg.steps
    ]
    if not records:
        raise ValueError(f"{directory}: no completions in samples.jsonl at these steps; legal: a run that sampled some")
    facts = read_facts(directory)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    numbered = list(number_in_groups(records))
    if cfg.format == "inspect":
        files = {f"{facts['run']}.json": inspect_log(facts, numbered)}
    else:
        files = {f"{trajectory_name(record, n)}.json": atif_trajectory(facts, record, n) for record, n in numbered}
    for name, document in files.items():
        write_atomically(out / name, json.dumps(document, allow_nan=False))
    log_info(f"{len(records)} completions in {len(files)} files: {out}")
    return [out / name for name in files]


def read_facts(directory: Path) -> dict[str, str]:
    """The names that both formats ask for: the run, its experiment, its model and its git revision."""
    document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    experiment = str(document.get("experiment") or "rljax")
    model = str(document.get("config", {}).get("model") or experiment)
    git = str(document.get("git") or "unknown")
    return {"run": directory.resolve().name, "experiment": experiment, "model": model, "git": git}


def number_in_groups(records: Sequence[dict]) -> Iterator[tuple[dict, int]]:
    """Each record with its number, from 1, among those of the same prompt at the same step."""
    seen: dict[tuple, int] = {}
    for record in records:
        key = (record["step"], record["group"])
        seen[key] = seen.get(key, 0) + 1
        yield record, seen[key]


def turns_of(record: dict) -> list[dict]:
    """Its turns and observations; a completion of one turn is one."""
    if "turns" in record:
        return record["turns"]
    chosen = np.flatnonzero(record["tokens"]["chosen"])
    start = int(chosen[0]) if len(chosen) else len(record["tokens"]["id"])
    turn = {"policy": 1, "text": record["completion"], "start": start, "end": len(record["tokens"]["id"])}
    return [turn | {"reward": record["reward"]}]


# -------------------------------------------------------------------------------------------------------------- Inspect


def inspect_log(facts: dict[str, str], numbered: Sequence[tuple[dict, int]]) -> dict[str, Any]:
    """The EvalLog of these records."""
    records = [record for record, _ in numbered]
    ids = list(dict.fromkeys(sample_id(record) for record in records))
    names = list(dict.fromkeys(name for record in records for name in scores_of(record)))
    spec = {
        "run_id": facts["run"],
        "task_id": facts["experiment"],
        "created": EPOCH_ZERO,
        "task": facts["experiment"],
        "dataset": {"name": facts["run"], "samples": len(ids), "sample_ids": ids},
        "model": facts["model"],
        "config": {"epochs": max(n for _, n in numbered)},
        "metadata": {"git": facts["git"]},
    }
    return {
        "version": 2,
        "status": "success",
        "eval": spec,
        "plan": {"name": "rollout"},
        "results": {
            "total_samples": len(records),
            "completed_samples": len(records),
            "scores": [inspect_score(name, records) for name in names],
        },
        "stats": {"started_at": EPOCH_ZERO, "completed_at": EPOCH_ZERO},
        "samples": [inspect_sample(facts, record, n) for record, n in numbered],
    }


def inspect_score(name: str, records: Sequence[dict]) -> dict[str, Any]:
    """The mean of one score over the completions that have it."""
    values = [scores_of(record)[name] for record in records if name in scores_of(record)]
    mean = {"name": "mean", "value": math.fsum(values) / len(values)}
    counts = {"scored_samples": len(values), "unscored_samples": len(records) - len(values)}
    return {"name": name, "scorer": name, **counts, "metrics": {"mean": mean}}


def inspect_sample(facts: dict[str, str], record: dict, n: int) -> dict[str, Any]:
    """The EvalSample of one completion."""
    messages = [{"role": "user", "content": record["prompt"]}]
    for turn in turns_of(record):
        role = (
            {"role": "assistant", "source": "generate", "model": facts["model"]} if turn["policy"] else {"role": "user"}
        )
        messages.append({**role, "content": turn["text"]})
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), None)
    stop_reason = {True: "stop", False: "max_tokens", None: "unknown"}[record["ended"]]
    choices = [] if last is None else [{"message": last, "stop_reason": stop_reason, **inspect_logprobs(record)}]
    columns = record.get("columns", {})
    return {
        "id": sample_id(record),
        "epoch": n,
        "input": record["prompt"],
        "target": columns.get("answer", ""),
        "messages": messages,
        "output": {"model": facts["model"], "choices": choices, "completion": "" if last is None else last["content"]},
        "scores": {name: {"value": value} for name, value in scores_of(record).items()},
        "metadata": {"step": record["step"], "group": record["group"], "length": record["length"], **columns},
    }


def inspect_logprobs(record: dict) -> dict[str, Any]:
    """Of the tokens of the last turn; nothing where the run did not keep them."""
    last = next(turn for turn in reversed(turns_of(record)) if turn["policy"])
    logps = logps_of(record, last)
    if logps is None:
        return {}
    texts = record["tokens"]["text"][last["start"] : last["end"]]
    content = [{"token": text, "logprob": logp} for text, logp in zip(texts, logps, strict=True)]
    return {"logprobs": {"content": content}}


def sample_id(record: dict) -> str:
    """The name of a prompt at a step."""
    return f"step{record['step']}-group{record['group']}"


def scores_of(record: dict) -> dict[str, float]:
    """The verifiers' results and the reward, those that there are."""
    scores = {**record["scores"], "reward": record["reward"]}
    return {name: value for name, value in scores.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------- ATIF


def trajectory_name(record: dict, n: int) -> str:
    """The name of one completion."""
    return f"{sample_id(record)}-{n}"


def atif_trajectory(facts: dict[str, str], record: dict, n: int) -> dict[str, Any]:
    """The trajectory of one completion: a user's step, and an agent's for each turn."""
    steps: list[dict[str, Any]] = [{"step_id": 1, "source": "user", "message": record["prompt"]}]
    for turn in turns_of(record):
        if turn["policy"]:
            steps.append(atif_step(record, turn, len(steps) + 1))
        else:
            steps[-1]["observation"] = {"results": [{"content": turn["text"]}]}
    tokens = record["tokens"]
    totals = {"total_completion_tokens": sum(tokens["chosen"]), "total_steps": len(steps)}
    outcome = {"reward": record["reward"], "scores": record["scores"], "ended": record["ended"]}
    return {
        "schema_version": ATIF_VERSION,
        "session_id": facts["run"],
        "trajectory_id": trajectory_name(record, n),
        "agent": {"name": facts["experiment"], "version": facts["git"], "model_name": facts["model"]},
        "steps": steps,
        "final_metrics": {**totals, "extra": outcome},
        "extra": {"step": record["step"], "group": record["group"], "columns": record.get("columns", {})},
    }


def atif_step(record: dict, turn: dict, number: int) -> dict[str, Any]:
    """The agent's step of one turn, with what it read and what it wrote as token ids."""
    ids = record["tokens"]["id"]
    start, end = turn["start"], turn["end"]
    metrics = {
        "prompt_tokens": start,
        "completion_tokens": end - start,
        "prompt_token_ids": ids[:start],
        "completion_token_ids": ids[start:end],
    }
    logps = logps_of(record, turn)
    if logps is not None:
        metrics["logprobs"] = logps
    extra = {name: turn[name] for name in ("reward", "notes") if turn.get(name) not in (None, "")}
    step = {"step_id": number, "source": "agent", "message": turn["text"], "metrics": metrics, "llm_call_count": 1}
    return step | ({"extra": extra} if extra else {})


def logps_of(record: dict, turn: dict) -> list[float] | None:
    """The sampler's log-probs of a turn's tokens; None where the run did not keep them all."""
    logps = record["tokens"].get("logp")
    if logps is None or None in logps[turn["start"] : turn["end"]]:
        return None
    return logps[turn["start"] : turn["end"]]


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
