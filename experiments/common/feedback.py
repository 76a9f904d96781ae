"""Feedback of collect.py: completions to compare, what a person says of them, the file, and how far a panel agrees."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.common.inputs import keep_settings
from experiments.common.records import as_lines
from rljax.data.examples import answer, prompt_of
from rljax.data.formats import messages_of, other_columns
from rljax.ops.agreement import cohen_kappa, fleiss_kappa, raw_agreement
from rljax.train.log import log_info, write_atomically

OTHERS = "holds other preferences; legal: a new file, or the command that wrote this one"


class Candidates(NamedTuple):
    """The completions of one prompt."""

    number: int  # of the prompt, in the order of collection
    row: dict  # what the prompt was made of
    texts: list[str]
    lengths: np.ndarray  # tokens of each
    ended: list[bool]  # whether each ended by itself; the others were cut at max_tokens
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
        "ended": [candidates.ended[better], candidates.ended[worse]],
        "row": candidates.number,
        "pair": [better, worse],
    }


def rankings_of(lines: Sequence[dict]) -> list[dict]:
    """The pairs of each prompt as one row {"prompt", "completions"}, the best first: that which won most of its pairs.

    Of completions that won equally often the first stays. A prompt of which one is left has no row.
    """
    of_prompt: dict[int, list[dict]] = {}
    for line in lines:
        of_prompt.setdefault(line["row"], []).append(line)
    rows = map(_ranking_of, of_prompt.values())
    return [row for row in rows if len(row["completions"]) > 1]


def _ranking_of(lines: Sequence[dict]) -> dict:
    wins: Counter[int] = Counter()
    found = {}
    for line in lines:
        ends = line.get("ended", (True, True))
        for number, column, ended in zip(line["pair"], ("chosen", "rejected"), ends, strict=True):
            found[number] = (line[column], ended)
            wins[number] += column == "chosen"
    by_wins = {wins[number]: found[number] for number in sorted(found, reverse=True)}
    completions, ended = zip(*(by_wins[count] for count in sorted(by_wins, reverse=True)), strict=True)
    others = {name: value for name, value in other_columns(lines[0]).items() if name not in ("pair", "votes")}
    return others | {"prompt": lines[0]["prompt"], "completions": list(completions), "ended": list(ended)}


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


def own_lines(path: str) -> list[dict]:
    """The lines of the file so far, none where there is no file. It is only read.

    A last line that was cut short is left out with all lines of the prompt before it. Raises ValueError for a file that
    collect.py did not write.
    """
    file = Path(path)
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""  # it may be cut within a character
    whole, _, rest = text.rpartition("\n")
    lines = [_parse(line) for line in whole.split("\n") if line.strip()]
    last = _parse(rest)
    if last is not None:
        lines.append(last)
    is_own = all(line is not None and isinstance(line.get("row"), int) and "pair" in line for line in lines)
    if not is_own or (text.strip() and not lines and not _record_of(path).is_file()):
        raise ValueError(f"{path} {OTHERS}")
    was_cut = bool(rest.strip()) and last is None
    return [line for line in lines if line["row"] != lines[-1]["row"]] if was_cut else lines


def end_last_line(path: str, lines: list[dict]) -> None:
    """Write the lines again where the file does not end with a new line."""
    file = Path(path)
    if file.is_file() and not file.read_bytes().endswith(b"\n"):
        write_atomically(file, as_lines(lines))


def keep_own_settings(path: str, settings: dict, inputs: Sequence[str], lines: list[dict]) -> None:
    """Keep the settings beside the file. Raises ValueError, naming what differs, where others wrote its lines."""
    if not lines:
        _record_of(path).unlink(missing_ok=True)
    keep_settings(_record_of(path), settings, inputs, f"{path} holds preferences", "--out")


def _record_of(path: str) -> Path:
    return Path(f"{path}.config.json")


def _parse(line: str) -> dict | None:
    """The object that a line holds; None where it holds none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def first_open(path: str, lines: list[dict], prompt_of: Callable[[int], str | list[dict]], voters: int) -> int:
    """The number of the first prompt that is not compared yet. `prompt_of`: number -> the prompt as it is written.

    Raises ValueError for a file of other prompts, or of another number of votes a line.
    """
    if not lines:
        return 0
    last = lines[-1]["row"]
    if prompt_of(last) != lines[-1].get("prompt") or any(len(line.get("votes", ())) != voters for line in lines):
        raise ValueError(f"{path} {OTHERS}")
    log_info(f"{path}: goes on after prompt {last + 1}")
    return last + 1


def report_cut(lines: list[dict]) -> None:
    """Say how many comparisons hold a completion that was cut."""
    cut = sum(not all(line.get("ended", ())) for line in lines)
    if cut:
        log_info(f"{cut} of {len(lines)} hold a completion that was cut at max_tokens: it is marked, and has no end")


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
