"""The methods of dpo.py: each learns what its rows say, from any rows that it reads, with the log-probs it is given."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.tiny import table_params, table_policy
from experiments.common import online_methods
from experiments.common.data import Examples
from experiments.common.offline import make_evaluate
from experiments.common.preference_methods import METHODS
from experiments.common.preference_rows import Row, collate_rows, empty_row, with_reference
from experiments.common.settings import Batches
from rljax.data.demonstrations import EMPTY
from rljax.data.examples import Example
from rljax.train.mesh import make_mesh, state_shardings
from rljax.types import TrainState, Trajectory

BEST, WORST = [1, 2, 1], [3, 4, 3, 4]


def example(prompt, completion):
    return Example(prompt, completion, [True] * len(completion), {})


def rows_of(method):
    """Three comparisons, or six judgments, of completions whose tokens tell which is better."""
    prompts = [[0], [1, 0], [2, 0]]
    better = [example(prompt, BEST) for prompt in prompts]
    worse = [example(prompt, WORST) for prompt in prompts]
    if method.rows == "judgments":
        judged = [Row((one,), label) for label, side in ((True, better), (False, worse)) for one in side]
        if method.mismatched:
            others = [row.completions[0] for row in judged[1:] + judged[:1]]
            judged = [
                row._replace(completions=(*row.completions, other)) for row, other in zip(judged, others, strict=True)
            ]
        return judged
    rated = 2.0 if method.rows == "rated pairs" else None
    gold = method.rows == "pairs with gold"
    return [Row((b, w, b) if gold else (b, w), rated) for b, w in zip(better, worse, strict=True)]


def table_logps(row):
    """The log-probs of the completions' tokens under the table at the start, in numpy."""
    table = np.float64(table_params()["table"])
    logits = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    found = []
    for one in row.completions:
        seen = [*one.prompt, *one.completion]
        found.append(np.float32([logits[seen[i - 1], seen[i]] for i in range(len(one.prompt), len(seen))]))
    return tuple(found)


def advantage(params):
    """By how much the better tokens are more likely."""
    logp = jax.nn.log_softmax(params["table"])
    return float(logp[0, 1] + logp[1, 2] + logp[2, 1] - logp[0, 3] - logp[3, 4] - logp[4, 3])


@pytest.mark.parametrize("name", METHODS)
def test_a_step_prefers_what_is_better(name):
    method = METHODS[name]
    rows = rows_of(method)
    if method.reference:
        rows = [row._replace(ref_logps=table_logps(row)) for row in rows]
    objective = method.make(table_policy, method.beta)
    batch = collate_rows([*rows, empty_row(rows[0])], method, 2, 4)
    batch = batch.replace(coefficients={name: jnp.zeros(()) for name in objective.state})
    params = table_params()
    batch = objective.prepare(params, {}, batch, jax.random.key(0))
    (_, found), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, {}, batch)
    metrics = {key: float(total / count) for key, (total, count) in found.items()}
    moved = jax.tree.map(lambda x, slope: x - 1e-3 / max(float(abs(slope).max()), 1e-9) * slope, params, gradient)
    # DiscoPOP's loss has a local minimum below a difference of 0: it steps back first (arXiv:2406.08414).
    assert (advantage(moved) > advantage(params)) == (name != "discopop")
    if method.reference:
        np.testing.assert_allclose(metrics["rewards/chosen"], 0.0, atol=1e-5 * max(method.beta, 1.0))
    if method.reference and name != "ld_dpo":  # which weighs tokens
        assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (
            pytest.approx(np.mean([x.sum() for x in labeled(rows, method, True)]), rel=1e-5),
            pytest.approx(np.mean([x.sum() for x in labeled(rows, method, False)]), rel=1e-5),
        )


def labeled(rows, method, desirable):
    """The reference's log-probs of the better or of the worse completions."""
    if method.rows == "judgments":
        return [row.ref_logps[0] for row in rows if row.label == desirable]
    return [row.ref_logps[0 if desirable else 1] for row in rows]


def test_an_empty_row_holds_nothing():
    row = empty_row(Row((EMPTY, EMPTY), True, (np.ones(2), np.ones(3))))
    assert row.completions == (EMPTY, EMPTY)
    assert row.label is False
    assert [x.size for x in row.ref_logps] == [0, 0]


def test_the_reference_is_asked_for_the_rows_that_are_read():
    """Of six rows to train on two are drawn, one of them twice; two are held out. A row is of two completions."""
    pairs = rows_of(METHODS["sigmoid"])
    params = table_params()
    state = TrainState(0, params, optax.EmptyState(), jax.random.key(0))
    axes = jax.tree.map(lambda x: (None,) * x.ndim, params)
    shardings = state_shardings(make_mesh(fsdp=1, tensor=-1), state, optax.identity(), axes)
    asked = []

    def annotate(state, traj):
        asked.append(len(traj.mask))
        return traj.replace(old_logp=traj.actions.astype(float))

    examples = Examples([*pairs, *pairs], pairs[:2])
    found = with_reference(examples, [4, 1, 4], annotate, state, (2, 4), 1, shardings)
    assert asked == [2] * 4
    logps = [[x.tolist() for x in row.ref_logps] for row in (*found.train, *found.eval)]
    assert logps == [[BEST, WORST] if i in (1, 4, 6, 7) else [] for i in range(8)]
    assert [row.completions for row in found.train] == [row.completions for row in examples.train]


def test_the_page_names_every_method():
    page = (Path(__file__).resolve().parents[1] / "docs" / "road.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| words \| rows \|\n.*?\n\n", page, flags=re.DOTALL)
    assert set(METHODS) <= set(re.findall(r"\w+", table))


@pytest.mark.parametrize("name", ["sigmoid", "kto", "kto_balanced", "bco", "aot", "cpo"])
def test_what_is_measured_on_rows_held_out_does_not_depend_on_pieces_or_batches(name):
    """z, λ, ranks, shifts and the tokens' mean are those of all rows that are held out."""
    method = METHODS[name]
    rows = rows_of(method)
    rows = [row._replace(ref_logps=tuple(x + 0.1 * i for x in table_logps(row))) for i, row in enumerate(rows)]
    filled = rows + [empty_row(rows[0])] * (16 - len(rows))
    objective = method.make(table_policy, method.beta)
    start = {name: jnp.zeros(()) for name in objective.state}
    params = table_params()
    state = TrainState(0, params, optax.identity().init(params), jax.random.key(0), coefficients=start)
    shardings = state_shardings(make_mesh(), state, optax.identity(), jax.tree.map(lambda x: (None,) * x.ndim, params))
    batches = [collate_rows(filled, method, 2, 4)]
    metrics = ("rewards/chosen", "rewards/rejected")
    whole, cut = (make_evaluate(objective, rows, batches, metrics, pieces, shardings)(state) for pieces in (1, 2))
    assert whole == pytest.approx(cut, rel=1e-5, abs=1e-6)
    halves = [collate_rows(part, method, 2, 4) for part in (filled[:8], filled[8:])]  # rows in smaller batches
    found = make_evaluate(objective, rows, halves, metrics, 1, shardings)(state)
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("penalty", "chosen"),
    [(0.0, [None, 2, None]), (1.0, [1, None, 5]), (0.5, [1, 2, 5])],
)
def test_online_dpo_takes_the_penalty_of_a_cut_completion_before_it_looks_for_pairs(penalty, chosen):
    """Three prompts, whose completions have the rewards 1 and 1, 1 and 0, 0 and 0; the first of each was cut."""
    rows = jnp.arange(6)[:, None]
    traj = Trajectory(
        inputs=rows,
        actions=rows,
        logp=jnp.zeros((6, 1)),
        mask=jnp.ones((6, 1), bool),
        rewards=jnp.array([[1.0], [1], [1], [0], [0], [0]]),
        terminated=jnp.array([[False], [True]] * 3),
        group=jnp.array([7, 7, 8, 8, 9, 9]),
    )
    preference = online_methods.Preference(missing_eos_penalty=penalty)
    method = online_methods.online_dpo(preference, Batches(num_generations=2), None, table_policy)
    pairs = method.make_batch(traj, None)
    rows, kept = (np.asarray(column)[:, 0].tolist() for column in (pairs.chosen.inputs, pairs.chosen.mask))
    assert [row if is_kept else None for row, is_kept in zip(rows, kept, strict=True)] == chosen
