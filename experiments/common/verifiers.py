"""The verifiers that `--rewards` can name, and a look at every row's answer before anything is loaded."""

from collections.abc import Callable, Mapping

from rljax.data.files import Table
from rljax.rewards.format import think_then_answer
from rljax.rewards.function_path import function_name
from rljax.rewards.number import exact_number, final_number, last_box
from rljax.rewards.pool import Pool
from rljax.rewards.score import LEGAL, RewardError, columns_taken, read_signature
from rljax.rewards.symbolic import equal_math
from rljax.rewards.text import animals, exact_text

VERIFIERS = {
    "animals": animals,
    "math": equal_math,
    "number": exact_number,
    "text": exact_text,
    "think": think_then_answer,
}
# What a majority is taken of. Of mathematics it is the text in the last box: 1/2 and 0.5 are two answers there.
FINAL_ANSWERS = {exact_number: final_number, exact_text: str.strip, equal_math: last_box}
TRIED = 64  # rows on which a verifier of somebody else's is tried: it may be slow


def check_answers(table: Table, verifiers: Mapping[str, Callable], pool: Pool) -> None:
    """Call each verifier with an empty completion on every row (one that is not in VERIFIERS: on the first 64).

    A verifier reads its columns whatever the completion is, and raises where they are not what it can judge by.
    Raises ValueError that counts these rows, names the first of them, and says which other verifiers would take all;
    RewardError for a row without a column that is needed, and for a verifier of somebody else's that fails.
    """
    work = []
    for verifier in verifiers.values():
        count = len(table.rows) if verifier in VERIFIERS.values() else min(TRIED, len(table.rows))
        work.append((verifier, [_empty_call(verifier, table, i) for i in range(count)]))
    for (name, verifier), results in zip(verifiers.items(), pool.map_each(work), strict=True):
        bad = [i for i, result in enumerate(results) if result.status == "error"]
        if not bad:
            continue
        detail = results[bad[0]].detail
        columns = sorted(read_signature(verifier).required)
        place = table.place(bad[0], *columns) if len(columns) == 1 else table.place(bad[0])
        if verifier not in VERIFIERS.values():
            raise RewardError(f"{function_name(verifier)} failed on an empty completion, {place}: {detail}\n{LEGAL}")
        message = detail.splitlines()[-1].partition("Error: ")[2]
        others = _that_take(table, bad, columns, pool)
        advice = f" ({' or '.join(others)} would take them all)" if others else ""
        raise ValueError(f"{place}: {name} cannot judge {len(bad)} of {len(results)} rows{advice}; here {message}")


def _empty_call(verifier: Callable, table: Table, i: int) -> tuple[tuple, dict]:
    """The call of a verifier with an empty completion and the columns of row i."""
    return ("",), columns_taken(verifier, read_signature(verifier), table.rows[i], table.place(i))


def _that_take(table: Table, rows: list[int], columns: list[str], pool: Pool) -> list[str]:
    """The names of verifiers that read these columns and raise on none of the rows."""
    others = {name: other for name, other in VERIFIERS.items() if sorted(read_signature(other).required) == columns}
    calls = [(other, [_empty_call(other, table, i) for i in rows]) for other in others.values()]
    judged = zip(others, pool.map_each(calls), strict=True) if columns else ()
    return [name for name, results in judged if all(result.status != "error" for result in results)]


def find_final_answer(verifiers: Mapping[str, Callable]) -> Callable[[str], object] | None:
    """completion -> its final answer, or None where it has none, as the first verifier that knows of one reads it."""
    return next((FINAL_ANSWERS[verifier] for verifier in verifiers.values() if verifier in FINAL_ANSWERS), None)
