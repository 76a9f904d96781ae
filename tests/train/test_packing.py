"""Packed batches: every decision is there once, bins are even, and an update is the one of unpacked rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rljax.algorithms import real
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import make_mesh, shard_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.packing import make_packed_update, pack_batch, plan_rows
from rljax.train.update import learn as learn_rollout
from rljax.train.update import make_update
from rljax.types import Batch, check_shapes, trajectory_of_tokens
from tests.algorithms.tiny import (
    ALGORITHMS,
    GRADIENT,
    agree,
    asked_for,
    credited,
    kinds_by_day,
    learn,
    rollout,
    state_of,
    table_params,
)


def texts(lengths, prompt=1, width=None):
    """A batch padded on both sides: row i has lengths[i] decisions, the first `prompt` of them context.

    Every number in it is another one.
    """
    width, B = width or max(lengths) + 3, len(lengths)
    draw = np.random.default_rng(sum(lengths))
    column, start = np.arange(width + 1)[None], draw.integers(0, width + 1 - np.array(lengths), B)[:, None]
    inside = (column >= start) & (column < start + np.array(lengths)[:, None] + 1) & (np.array(lengths)[:, None] > 0)
    chosen = inside & (column > start + prompt)
    cells = np.arange(1, 4 * inside.size + 1).reshape(4, *inside.shape).astype(np.float32)
    traj = trajectory_of_tokens(
        cells[0].astype(int), inside.astype(int), jnp.asarray(chosen), cells[1], rewards=cells[2], group=np.arange(B)
    )
    traj = traj.replace(values=cells[3], dist=cells[:2, :, 1:].transpose(1, 2, 0), scores=np.ones((B, 2)))
    return Batch(
        traj=traj, advantages=-cells[1][:, 1:], mask=traj.mask, extra={"x": cells[2][:, 1:]}, coefficients={"kl": 0.5}
    )


def test_three_texts_by_hand():
    """Of 4, 2 and 3 decisions, in two rows of 5: the longest has its own, and the fuller row is dealt first."""
    batch = texts([4, 2, 3], width=6)
    got, micro_batches, shown = pack_batch(batch, 5, rows=2)
    check_shapes(got)
    first = batch.traj.segments.argmax(axis=1)
    want = [[(1, c) for c in range(2)] + [(2, c) for c in range(3)], [(0, c) for c in range(4)]]
    for row, cells in enumerate(want):
        n = len(cells)
        source = np.array([6 * text + first[text] + c for text, c in cells])
        for name in ("inputs", "actions", "logp", "mask", "positions", "rewards"):
            np.testing.assert_array_equal(
                getattr(got.traj, name)[row, :n], np.asarray(getattr(batch.traj, name)).ravel()[source], err_msg=name
            )
        np.testing.assert_array_equal(got.traj.values[row, :n], batch.traj.values[:, :-1].ravel()[source])
        np.testing.assert_array_equal(got.traj.dist[row, :n], batch.traj.dist.reshape(-1, 2)[source])
        np.testing.assert_array_equal(got.advantages[row, :n], np.asarray(batch.advantages).ravel()[source])
        np.testing.assert_array_equal(got.extra["x"][row, :n], batch.extra["x"].ravel()[source])
    assert got.traj.segments.tolist() == [[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]]
    assert got.mask.astype(int).tolist() == [[0, 1, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert (got.traj.scores, got.coefficients) == (None, {"kl": 0.5})
    assert jnp.where(got.traj.segments > 0, got.traj.group, 9).tolist() == [[1, 1, 2, 2, 2], [0, 0, 0, 0, 9]]
    assert micro_batches == 1
    assert shown == pytest.approx({"padding_before": 1 - 9 / 18, "padding_after": 1 - 9 / 10})


def test_texts_are_whole_and_each_is_there_once():
    """Read back segment by segment, for two devices."""
    lengths = np.random.default_rng(0).integers(0, 12, 60)
    batch = texts(lengths, prompt=2)
    got, micro_batches, _ = pack_batch(batch, 20, rows=3, devices=2)
    assert micro_batches > 1
    found, inputs = [], np.asarray(got.traj.inputs)
    for row, segments in enumerate(np.asarray(got.traj.segments)):
        for number in range(1, segments.max() + 1):
            (columns,) = np.nonzero(segments == number)
            np.testing.assert_array_equal(columns, columns[0] + np.arange(len(columns)))
            np.testing.assert_array_equal(got.traj.positions[row, columns], np.arange(len(columns)))
            np.testing.assert_array_equal(got.mask[row, columns], np.arange(len(columns)) >= 2)
            found.append(inputs[row, columns].tolist())
    assert not got.mask[got.traj.segments == 0].any()
    inside = np.asarray(batch.traj.segments) > 0
    whole = [ids[own].tolist() for ids, own in zip(batch.traj.inputs, inside, strict=True) if own.sum() > 2]
    assert sorted(found) == sorted(whole)
    for name in ("logp", "rewards", "actions"):
        kept, all_ = getattr(got.traj, name)[got.mask], getattr(batch.traj, name)[batch.mask]
        np.testing.assert_array_equal(np.sort(kept), np.sort(all_), err_msg=name)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@given(LENGTHS, st.integers(12, 30), st.integers(1, 5), st.integers(1, 4))
def test_every_text_has_a_place_in_a_row_that_holds_it(lengths, width, rows, devices):
    lengths = np.array(lengths)
    row, micro_batches, count = plan_rows(lengths, width, rows, devices)
    assert row.min() >= 0
    assert np.bincount(row, lengths, count).max() <= width
    assert count % (devices * micro_batches) == 0
    assert count // (devices * micro_batches) <= rows


@given(LENGTHS, st.integers(12, 30), st.integers(1, 5), st.integers(1, 4))
def test_no_bin_has_more_than_the_mean_and_one_text(lengths, width, rows, devices):
    """Bins as the update and the mesh cut rows: contiguous over devices, then every M-th row."""
    lengths = np.array(lengths)
    row, M, count = plan_rows(lengths, width, rows, devices)

    def by_bin(of_text):
        of_row = np.bincount(row, of_text, count)
        return of_row.max(), np.stack([of_row.reshape(devices, -1)[:, m::M].sum(axis=1) for m in range(M)]).ravel()

    _, tokens = by_bin(lengths)
    assert tokens.sum() == lengths.sum()
    assert tokens.max() - tokens.min() <= lengths.max()
    assert tokens.max() <= tokens.mean() + lengths.max()
    most, work = by_bin(lengths**2)
    assert work.max() <= work.mean() + most


@given(LENGTHS, st.integers(12, 30), st.integers(1, 4))
def test_there_are_no_more_rows_than_first_fit_needs(lengths, width, devices):
    """With a step fewer no row had room for one of the texts, so all were nearly full."""
    lengths = np.array(lengths)
    _, _, count = plan_rows(lengths, width, 1000, devices)
    fewer = count // devices - max(count // devices // 16, 1)
    assert fewer == 0 or lengths.sum() > fewer * devices * (width - lengths.max())


def test_few_shapes_come_up():
    """1 to 16 rows a device, then steps of at most a sixteenth."""
    counts = sorted({plan_rows(np.full(n, 10), 10, 1000, 1)[2] for n in range(1, 70)})
    assert counts == [*range(1, 33), *range(34, 65, 2), 68, 72]


# -------------------------------------------------------------------------------------------------- the same update

RANDOM = {"clip_cov", "all at once"}  # draw a number for each place of the batch


def filtered(batch):
    """The batch without the decisions of row 5 and the last one of row 6."""
    last = batch.mask.shape[1] - 1 - batch.mask[6, ::-1].argmax()
    return batch.replace(mask=batch.mask.at[5].set(False).at[6, last].set(False))


@pytest.mark.parametrize("name", kinds_by_day(name for name in ALGORITHMS if name not in RANDOM | {"real"}))
def test_an_update_of_packed_rows_is_that_of_unpacked_ones(name):
    """Loss, gradients and every metric, in the micro-batches of two devices."""
    algorithm = ALGORITHMS[name]
    batch = filtered(credited(algorithm, rollout()))
    want = learn(algorithm, batch, table_params())
    together, micro_batches, shown = pack_batch(batch, 7, rows=1, devices=2)
    assert micro_batches > 1
    assert shown["padding_after"] < shown["padding_before"]
    agree(learn(algorithm, together, table_params(), micro_batches=micro_batches), want)


DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)
POLICY = models.make_policy(DECODER)


def of_decoder(name, sizes, width=None, tokens=None):
    """Gradient and metrics of a real update on a mesh: packed where there is a width."""
    algorithm, params, shardings = ALGORITHMS[name], models.init(DECODER, jax.random.key(1)), None
    params = models.with_value_head(params, DECODER)
    params["value_head"] = jnp.linspace(-1, 1, DECODER.hidden_size)
    if sizes is not None:
        axes = models.logical_axes(DECODER, params)
        shardings = state_shardings(make_mesh(*sizes), state_of(params), GRADIENT, axes)

    def make(micro_batches):
        return make_update(policy_objective(POLICY, algorithm), GRADIENT, micro_batches, shardings)

    update = make(1) if width is None else make_packed_update(make, tokens, width, shardings)
    state, batch = state_of(params), credited(algorithm, rollout(vocabulary=16))
    if shardings is not None:
        state, batch = jax.device_put(state, shardings.state), shard_rows(shardings, batch)
    state, metrics = learn_rollout(update, state, batch)
    return jax.device_get((state.opt_state[0].trace, metrics))


@pytest.mark.parametrize("name", ["ppo + kl + entropy", "gspo"])
def test_on_a_mesh_too_where_texts_must_not_see_each_other(name):
    gradient, want = of_decoder(name, None)
    for sizes, tokens in (((2, 2, 2), 7), ((1, 4, 2), 1000)):
        found, metrics = of_decoder(name, sizes, 7, tokens)
        agree((found, {name: metrics[name] for name in want}), (gradient, want))
        assert metrics.keys() - want.keys() == {"padding_before", "padding_after", "micro_batches"}
        assert metrics["micro_batches"] == (1 if tokens == 1000 else 2)
        assert 0 < metrics["padding_after"] < metrics["padding_before"]


def test_a_batch_of_nothing_is_a_row_of_padding():
    algorithm = ALGORITHMS["grpo"]
    batch = credited(algorithm, rollout())
    together, _, shown = pack_batch(batch.replace(mask=batch.mask & False), 9, rows=2)
    assert shown == {"padding_before": 1.0, "padding_after": 1.0}
    gradient, metrics = learn(algorithm, together, table_params())
    assert not gradient["table"].any()
    assert metrics["loss"] == 0


# --------------------------------------------------------------------------------------------------------- refusals


def without_segments(batch):
    return batch.replace(traj=batch.traj.replace(segments=None))


def holed(batch):
    return batch.replace(traj=batch.traj.replace(segments=batch.traj.segments.at[1, batch.mask[1].argmax()].set(0)))


def two_texts(batch):
    return batch.replace(traj=batch.traj.replace(segments=batch.traj.segments.at[2, batch.mask[2].argmax() :].add(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.traj, "only a Batch is packed, after credit; not Trajectory"),
        (without_segments, "Trajectory.segments is None"),
        (holed, "row 1 is not one sequence"),
        (two_texts, "row 2 is not one sequence"),
        (lambda b: b.replace(extra={"y": jnp.ones(3)}), r"extra\.y has shape \(3,\); to be packed .* \(3, 7\)"),
        (lambda b: b.replace(returns=jnp.ones(3)), r"Batch.returns has shape \(3,\)"),
        (lambda b: pack_batch(b, 9, 1)[0], "row 0 is not one sequence"),
    ],
    ids=["a trajectory", "no segments", "a hole", "two texts", "a fact of rows", "a shape", "packed already"],
)
def test_what_cannot_be_packed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pack_batch(change(texts([4, 3, 2])), 9, rows=1)


def test_a_text_that_is_too_long_and_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="row 1 holds a sequence of 5 decisions; a packed row holds 4"):
        pack_batch(texts([4, 5, 2]), 4, rows=1)
    with pytest.raises(ValueError, match="3 tokens at a time hold no row of 4; legal: at least 4 tokens"):
        make_packed_update(lambda micro_batches: None, 3, 4)


def test_real_refuses_packed_rows_as_it_compares_those_of_a_group():
    together, _, _ = pack_batch(credited(real(), asked_for(real(), rollout())), 9, rows=2)
    with pytest.raises(ValueError, match=r"Trajectory\.group"):
        learn(real(), together, table_params())
