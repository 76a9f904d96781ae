"""Solutions of a file, judged by verifiers; and how often these agree with the labels that the file has.

    python experiments/score.py --data gsm8k_solutions.jsonl --rewards number --completion solution
    python experiments/score.py --data math.jsonl --rewards math --completion solution --answer solution

A row has a completion and the columns that the verifiers want; `answer` is what --answer names. The verifiers run in
worker processes under a deadline (--reward.timeout_seconds). A line of DIRECTORY/scores.jsonl is a row with `scores`
and `statuses`: ok, none (the verifier does not apply), timeout, died. An interrupted run goes on where it stopped.

The last line of a reward counts the completions that it holds for right (a score of at least --right), with the mean
score, and where the file has labels (true or false, 1 or 0) those on which both agree.

Reached: the 2,638 solutions of GSM8K's 6B models, number: agrees with the published label on every one (801 right for
both, 1,837 wrong for both), in 5 s on 2 shared AMD EPYC cores.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.common import command_line, data, runs
from experiments.common.records import append_lines, read_lines
from experiments.common.settings import Rare, Reward
from experiments.common.verifiers import VERIFIERS, check_answers, with_sandbox
from rljax.data.files import Table, read_table
from rljax.rewards.pool import Call, Pool
from rljax.rewards.score import RewardError, columns_taken, read_signature
from rljax.train.log import log_info, write_atomically

COMPLETIONS = ("completion", "solution")  # columns that are taken for it, the first that a file has
LABELS = ("is_correct", "label")
WRITTEN = ("scores", "statuses")


@dataclasses.dataclass(frozen=True)
class Config:
    """Solutions of a file, judged by verifiers."""

    data: str  # jsonl, json or parquet file, or hf://OWNER/NAME
    rewards: tuple[str, ...] = ("number",)  # names of verifiers
    completion: str = ""  # column of the text to judge; default: completion, or solution
    answer: str = "answer"  # column that verifiers get as `answer`
    label: str = ""  # column that says whether it is right; default: is_correct, or label, where the file has one
    right: float = 1.0  # least score of a completion that is right
    reward: Reward = Reward()
    rows_at_once: Rare[int] = 256  # rows between two writes
    directory: str = ""  # of the run; default runs/score/DATA-REWARDS-DIGEST, that of the other settings
    debug: bool = False  # an error shows its traceback


def main(cfg: Config, verifiers: Mapping[str, Callable] = VERIFIERS) -> dict[str, dict[str, float | None]]:
    """Judge every row; return for each reward how many rows are of which kind, and the mean score."""
    if unknown := [name for name in cfg.rewards if name not in verifiers]:
        raise ValueError(
            f"reward {unknown[0]!r}; legal: {', '.join(verifiers)} (a reward model, a judge or a server judges what a "
            "model samples: evaluate.py, best_of_n.py)"
        )
    chosen = {name: with_sandbox(verifiers[name], cfg.reward) for name in cfg.rewards}

    # -- the rows
    table = read_table(cfg.data)
    completion = find_column(table, cfg.completion, COMPLETIONS) or ""
    label = find_column(table, cfg.label, LABELS, required=False)
    check_columns(table, completion, label)
    read = table._replace(rows=[with_answer(row, cfg.answer) for row in table.rows])  # what the verifiers read

    # -- judge
    settings = runs.settings_but(cfg, "right")  # which is read at the end only: it may change
    name = "-".join((data.name_of(cfg.data), *cfg.rewards, runs.digest_of(settings)))
    directory = cfg.directory or f"runs/score/{name}"
    run = runs.make_run_of_one_step(cfg, directory, settings, __file__, chosen)
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        check_answers(read, chosen, pool)
        log = run.directory / "scores.jsonl"
        records = read_lines(log)
        for start in range(len(records), len(table.rows), cfg.rows_at_once):
            rows = range(start, min(start + cfg.rows_at_once, len(table.rows)))
            judged = judge(read, rows, completion, chosen, pool)
            new = [table.rows[i] | found for i, found in zip(rows, judged, strict=True)]
            append_lines(log, new)
            records += new
            log_info(f"{len(records)} of {len(table.rows)} rows", "dim")
        counts = {name: count(records, name, label, cfg.right) for name in chosen}
        write_atomically(run.directory / "summary.json", json.dumps(counts, indent=2) + "\n")
    log_info(f"written: {Path(directory) / 'scores.jsonl'}")
    for name, found in counts.items():
        log_info(sentence(name, found, label, cfg.right))
    return counts


# ------------------------------------------------------------------------------------------------------------ the rows


def find_column(table: Table, wanted: str, usual: tuple[str, ...], required: bool = True) -> str | None:
    """The column of that name, or the first of the usual ones that the first row has."""
    first = table.rows[0]
    names = (wanted,) if wanted else usual
    found = next((name for name in names if name in first), None)
    if found is None and (wanted or required):
        raise ValueError(f"{table.place(0)} has no column {' or '.join(names)}; its columns are {', '.join(first)}")
    return found


def check_columns(table: Table, completion: str, label: str | None) -> None:
    """Raise ValueError at the first row whose completion is no text, whose label is neither true nor false, or which
    has a column that is to be written.
    """
    for i, row in enumerate(table.rows):
        if taken := [column for column in WRITTEN if column in row]:
            raise ValueError(
                f"{table.place(i, taken[0])}: this script writes {' and '.join(WRITTEN)}; legal: other names"
            )
        if not isinstance(row.get(completion), str):
            raise ValueError(f"{table.place(i, completion)}: {row.get(completion)!r}; legal: a text")
        if label is not None and row.get(label) not in (True, False):
            raise ValueError(f"{table.place(i, label)}: {row.get(label)!r}; legal: true or false, 1 or 0")


def with_answer(row: dict, column: str) -> dict:
    """The row with the answer under the name that verifiers ask for."""
    return row | {"answer": row[column]} if column in row else row


# --------------------------------------------------------------------------------------------------------------- judge


def judge(table: Table, rows: range, completion: str, verifiers: Mapping[str, Callable], pool: Pool) -> list[dict]:
    """What each verifier says of these rows. Raises RewardError, naming the row, for a verifier that fails."""
    work = []
    for name, verifier in verifiers.items():
        signature = read_signature(verifier)
        calls: list[Call] = [
            ((table.rows[i][completion],), columns_taken(name, signature, table.rows[i], table.place(i))) for i in rows
        ]
        work.append((verifier, calls))
    results = dict(zip(verifiers, pool.map_each(work), strict=True))
    for name, found in results.items():
        for i, result in zip(rows, found, strict=True):
            if result.status == "error":
                raise RewardError(f"{name} failed on {table.place(i, completion)}: {result.detail}")
    return [
        {
            "scores": {name: found[k].value for name, found in results.items()},
            "statuses": {name: found[k].status for name, found in results.items()},
        }
        for k in range(len(rows))
    ]


def count(records: list[dict], name: str, label: str | None, right: float) -> dict[str, float | None]:
    """How many rows this reward judged and holds for right, and the mean score; with labels, each of the four kinds."""
    scores = [record["scores"][name] for record in records]
    judged = [score for score in scores if score is not None]
    counts = {
        "rows": len(records),
        "failed": scores.count(None),
        "right": sum(score >= right for score in judged),
        "mean": sum(judged) / len(judged) if judged else None,
    }
    if label is None:
        return counts
    pairs = [(s >= right, bool(record[label])) for s, record in zip(scores, records, strict=True) if s is not None]
    kinds = {
        "both_right": (True, True),
        "only_the_verifier": (True, False),
        "only_the_label": (False, True),
        "both_wrong": (False, False),
    }
    return counts | {kind: pairs.count(pair) for kind, pair in kinds.items()}


def sentence(name: str, found: Mapping[str, float | None], label: str | None, right: float) -> str:
    """The counts in one line."""
    judged = found["rows"] - found["failed"]
    mean = f", mean score {found['mean']:.3f}" if judged else ""
    line = (
        f"{name}: {found['right']:,} of {judged:,} right (a score of at least {right:g}){mean}, "
        f"{found['failed']:,} not judged"
    )
    if label is None:
        return line
    agreed = found["both_right"] + found["both_wrong"]
    return (
        f"{line}; agrees with {label} on {agreed:,} of {judged:,} (right for both {found['both_right']:,}, for the "
        f"verifier alone {found['only_the_verifier']:,}, for the label alone {found['only_the_label']:,}, wrong for "
        f"both {found['both_wrong']:,})"
    )


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
