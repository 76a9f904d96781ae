"""The verifiers that `--rewards` can name, and a look at every row's answer before anything is loaded."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from experiments.common import settings
from rljax.data.files import Table
from rljax.ops.templates import fill
from rljax.rewards.code import function_tests, stdin_tests
from rljax.rewards.format import think_then_answer
from rljax.rewards.judge import FIELDS, RUBRICS
from rljax.rewards.number import exact_number, final_number, last_box
from rljax.rewards.pool import Call, Pool
from rljax.rewards.sandbox import probe_isolation
from rljax.rewards.score import LEGAL, RewardError, columns_taken, read_signature
from rljax.rewards.symbolic import equal_math
from rljax.rewards.text import animals, exact_text
from rljax.rewards.worker import Result, call_verifier

VERIFIERS = {
    "animals": animals,
    "code": function_tests,
    "code_stdin": stdin_tests,
    "math": equal_math,
    "number": exact_number,
    "text": exact_text,
    "think": think_then_answer,
}
# What a majority is taken of. Of mathematics it is the text in the last box: 1/2 and 0.5 are two answers there.
FINAL_ANSWERS = {exact_number: final_number, exact_text: str.strip, equal_math: last_box}
SAFE = {animals, exact_number, exact_text, think_then_answer}  # end soon by themselves: need no worker's deadline
SANDBOXED = {function_tests, stdin_tests}
SANDBOX_SHARE = 0.6  # of a verifier's deadline that the model's code has; the sandbox around it takes some time, too
TRIED = 64  # rows on which a verifier of somebody else's is tried: it may be slow


def with_sandbox(verifier: Callable, options: settings.Reward) -> Callable:
    """The verifier; one that runs the model's code, with the isolation and the deadline that the settings demand.

    Raises SandboxError where this machine does not have that isolation.
    """
    if verifier not in SANDBOXED:
        return verifier
    probe_isolation(options.isolation)
    seconds = SANDBOX_SHARE * options.timeout_seconds
    return partial(verifier, isolation=options.isolation, partial_credit=options.partial_credit, seconds=seconds)


def check_answers(table: Table, verifiers: Mapping[str, Callable], pool: Pool) -> None:
    """Call each verifier with an empty completion on every row (one that is not in VERIFIERS: on the first 64).

    A verifier reads its columns whatever the completion is, and raises where they are not what it can judge by.
    Raises ValueError that counts these rows, names the first of them, and says which other verifiers would take all;
    RewardError for a row without a column that is needed, and for a verifier of somebody else's that fails.
    """
    work = []
    for name, verifier in verifiers.items():
        count = len(table.rows) if verifier in VERIFIERS.values() else min(TRIED, len(table.rows))
        work.append((verifier, [_empty_call(name, verifier, table, i) for i in range(count)]))
    for (name, verifier), results in zip(verifiers.items(), _call_each(work, pool), strict=True):
        bad = [i for i, result in enumerate(results) if result.status == "error"]
        if not bad:
            continue
        detail = results[bad[0]].detail
        columns = sorted(read_signature(verifier).required)
        place = table.place(bad[0], *columns) if len(columns) == 1 else table.place(bad[0])
        if verifier not in VERIFIERS.values():
            raise RewardError(f"{name} failed on an empty completion, {place}: {detail}\n{LEGAL}")
        message = detail.splitlines()[-1].partition("Error: ")[2]
        others = _that_take(table, bad, columns, pool)
        advice = f" ({' or '.join(others)} would take them all)" if others else ""
        raise ValueError(f"{place}: {name} cannot judge {len(bad)} of {len(results)} rows{advice}; here {message}")


def read_rubric(options: settings.Reward) -> str:
    """The question to a judge, by the settings."""
    return Path(options.rubric).read_text(encoding="utf-8") if options.rubric else RUBRICS[options.compare]


def check_rubric_columns(table: Table, options: settings.Reward) -> None:
    """Fill in the rubric of the judge for every row, without completions. Raises ValueError, naming the row."""
    rubric = read_rubric(options)
    others = dict.fromkeys(("prompt", *FIELDS[options.compare]), "?")
    for i, row in enumerate(table.rows):
        try:
            fill(rubric, row | others, "the rubric of the judge")
        except ValueError as error:
            raise ValueError(f"{table.place(i)}: {error}") from None


def _empty_call(name: str, verifier: Callable, table: Table, i: int) -> Call:
    """The call of a verifier with an empty completion and the columns of row i."""
    return ("",), columns_taken(name, read_signature(verifier), table.rows[i], table.place(i))


def _call_each(work: Sequence[tuple[Callable, list[Call]]], pool: Pool) -> list[list[Result]]:
    """The Results of `pool.map_each`; safe functions are called here, where no process is started for them."""
    from_pool = iter(pool.map_each([(function, calls) for function, calls in work if function not in SAFE]))
    return [
        [call_verifier(function, *call) for call in calls] if function in SAFE else next(from_pool)
        for function, calls in work
    ]


def _that_take(table: Table, rows: list[int], columns: list[str], pool: Pool) -> list[str]:
    """The names of verifiers that read these columns and raise on none of the rows."""
    others = {name: other for name, other in VERIFIERS.items() if sorted(read_signature(other).required) == columns}
    calls = [(other, [_empty_call(name, other, table, i) for i in rows]) for name, other in others.items()]
    judged = zip(others, _call_each(calls, pool), strict=True) if columns else ()
    return [name for name, results in judged if all(result.status != "error" for result in results)]


def find_final_answer(verifiers: Mapping[str, Callable]) -> Callable[[str], object] | None:
    """completion -> its final answer, or None where it has none, as the first verifier that knows of one reads it."""
    return next((FINAL_ANSWERS[verifier] for verifier in verifiers.values() if verifier in FINAL_ANSWERS), None)
