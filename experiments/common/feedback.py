"""Feedback of collect.py: completions to compare, what a person says of them, the file, and how far a panel agrees."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.common.records import as_lines, read_lines
from rljax.data.examples import answer, prompt_of
from rljax.data.formats import messages_of, other_columns
from rljax.ops.agreement import cohen_kappa, fleiss_kappa, raw_agreement
from rljax.train.log import log_info, write_atomically
from rljax.train.report import changed_settings


class Candidates(NamedTuple):
    """The completions of one prompt."""

    number: int  # of the prompt, in the order of collection
    row: dict  # what the prompt was made of
    texts: list[str]
    lengths: np.ndarray  # tokens of each
    scores: np.ndarray | None  # their rewards, which a panel knows; NaN where it could not be judged


def line_of(candidates: Candidates, better: int, worse: int) -> dict:
    """A preference in the columns of TRL's format, a conversation where the prompt is one; and which pair it is.

    `tools` and the other columns that no format reads go along, but for votes, which a panel writes.
    """
    prompt = prompt_of(candidates.row)
    rest = {name: value for name, value in other_columns(candidates.row).items() if name != "votes"}
    return rest | {
        "prompt": prompt,
        "chosen": answer(prompt, candidates.texts[better]),
        "rejected": answer(prompt, candidates.texts[worse]),
        "row": candidates.number,
        "pair": [better, worse],
    }


# ------------------------------------------------------------------------------------------------------------ a person


def compare_by_person(
    candidates: Candidates, kind: Literal["ranking", "scores"], ask: Callable[[str], str]
) -> list[dict] | None:
    """A line for each pair that a person prefers one of; None where the person stops."""
    n = len(candidates.texts)
    log_info(f"\n[{candidates.number + 1}] ", "dim", end="")
    log_info(shown(prompt_of(candidates.row)), "bold")
    for number, text in enumerate(candidates.texts, 1):
        log_info(f"  {number}) ", "cyan", end="")
        log_info(text)
    example = " ".join(map(str, range(1, n + 1)))
    wanted = f"order, the best first ({example})" if kind == "ranking" else "a score of each, higher is better"
    while True:
        try:
            answer = ask(f"{wanted}; empty: leave out; q: stop > ").split()
        except EOFError:
            return None
        if answer == ["q"]:
            return None
        if not answer:
            return []
        worth = worth_of(answer, n, kind)
        if worth is not None:
            break
        log_info(f"legal: {n} numbers" + (f", each of 1 to {n} once" if kind == "ranking" else ""))
    lines = []
    for i, j in itertools.combinations(range(n), 2):
        better, worse = (i, j) if worth[i] > worth[j] else (j, i)
        margin = {"margin": abs(worth[i] - worth[j])} if kind == "scores" else {}
        if worth[i] != worth[j]:
            lines.append(line_of(candidates, better, worse) | margin)
    return lines


def worth_of(answer: list[str], n: int, kind: str) -> list[float] | None:
    """A number for each completion, from what a person typed; None where that is not legal."""
    try:
        numbers = [float(word) for word in answer]
    except ValueError:
        return None
    if kind == "scores":
        return numbers if len(numbers) == n and np.isfinite(numbers).all() else None
    if sorted(numbers) != list(range(1, n + 1)):
        return None
    return [float(-numbers.index(number)) for number in range(1, n + 1)]


def shown(prompt: str | list[dict]) -> str:
    """A prompt as a person reads it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in messages_of({"prompt": prompt}, "prompt"))


# ------------------------------------------------------------------------------------------------------------ the file


def whole_lines(path: str) -> list[dict]:
    """The lines of the file so far, none where there is no file.

    Where the last one was cut short, it is removed from the file with all lines of the prompt before it.
    """
    file = Path(path)
    was_cut = file.is_file() and not file.read_bytes().endswith(b"\n")
    lines = read_lines(file)
    if was_cut and lines:
        lines = [line for line in lines if line["row"] != lines[-1]["row"]]
        write_atomically(file, as_lines(lines))
    return lines


def first_open(path: str, lines: list[dict], prompt_of: Callable[[int], str | list[dict]], voters: int) -> int:
    """The number of the first prompt that is not compared yet. `prompt_of`: number -> the prompt as it is written.

    Raises ValueError for a file of other prompts, or of another number of votes a line.
    """
    if not lines:
        return 0
    last = lines[-1].get("row")
    same_prompt = isinstance(last, int) and prompt_of(last) == lines[-1].get("prompt")
    if not same_prompt or any(len(line.get("votes", ())) != voters for line in lines):
        raise ValueError(f"{path} holds other preferences; legal: a new file, or the command that wrote this one")
    log_info(f"{path}: goes on after prompt {last + 1}")
    return last + 1


def check_settings(path: str, settings: dict, lines: list[dict]) -> None:
    """Keep the settings beside the file. Raises ValueError, naming what differs, where others wrote its lines."""
    record = Path(f"{path}.config.json")
    now = json.loads(json.dumps(settings))
    if not lines or not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(now, indent=1))
        return
    changed = changed_settings(json.loads(record.read_text(encoding="utf-8")), now)
    if changed:
        raise ValueError(
            f"{path} holds preferences of other settings: {changed}; legal: a new --out, or these settings"
        )


def report_agreement(lines: list[dict]) -> None:
    """Print how far a panel agrees: the share of equal votes, and kappa, which takes off what chance agrees on."""
    voted = [line for line in lines if len(line.get("votes", ())) > 1]
    if not voted:
        return
    # Of each vote whether it is for the completion with the lower number: "chosen" follows the votes themselves.
    labels = jnp.asarray([np.equal(line["votes"], line["pair"][0] < line["pair"][1]) for line in voted], jnp.int32)
    annotators = labels.shape[1]
    name, kappa = ("Cohen's", cohen_kappa) if annotators == 2 else ("Fleiss'", fleiss_kappa)
    log_info(
        f"{annotators} annotators agree on {float(raw_agreement(labels, 2)):.1%} of {len(voted)} pairs; "
        f"{name} kappa {float(kappa(labels, 2)):.3f}"
    )
