"""An update that computes prompts once: the same loss, gradient and metrics, whatever the algorithm and the mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algorithms import dpo
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import make_mesh, shard_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.packing import SharedColumns, _bundles, make_packed_update, pack_batch
from rljax.train.shared_prefix import (
    is_prefix_of_pairs,
    is_prefix_shared,
    make_shared_prefix_annotate,
    make_shared_prefix_update,
    share_prefix,
    with_own_prefixes,
)
from rljax.train.update import make_update
from rljax.types import Batch, Pairs, check_shapes, trajectory_of_tokens
from tests.algorithms.tiny import (
    ALGORITHMS,
    GRADIENT,
    T,
    agree,
    credited,
    kinds_by_day,
    learn,
    rollout,
    state_of,
    table_params,
)

COLUMNS = 3
RANDOM = {"clip_cov", "all at once"}  # draw a number for each column of the batch


def after_a_prompt(batch, group_size):
    """The batch with COLUMNS more in front, which neighboring rows have in common and where nothing was chosen."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (COLUMNS, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=1)

    traj = batch.traj
    of_rows = {name: getattr(traj, name) for name in ("group", "scores", "reward_weights", "baseline")}
    padded = jax.tree.map(pad, batch.replace(traj=traj.replace(**dict.fromkeys(of_rows)), coefficients={}))
    prompts = np.random.default_rng(0).integers(0, 5, (len(batch.mask) // group_size, COLUMNS))
    inputs = padded.traj.inputs.at[:, :COLUMNS].set(prompts.repeat(group_size, axis=0))
    mask = padded.mask.at[:, :COLUMNS].set(False)
    chosen = padded.traj.mask.at[:, :COLUMNS].set(False)
    traj = padded.traj.replace(inputs=inputs, mask=chosen, **of_rows)
    return padded.replace(traj=traj, mask=mask, coefficients=batch.coefficients)


def without_left_padding(batch):
    """The batch with each row's sequence from column 0 on."""
    first = batch.traj.segments.argmax(axis=1)

    def shift(x):
        if jnp.ndim(x) < 2 or x.shape[1] < T:
            return x
        return jnp.stack([x[row].at[:T].set(jnp.roll(x[row, :T], -first[row], axis=0)) for row in range(len(x))])

    return jax.tree.map(shift, batch)


@pytest.mark.parametrize("name", kinds_by_day(name for name in ALGORITHMS if name not in RANDOM))
def test_no_loss_sees_the_columns_of_a_prompt(name):
    """Loss, gradient and metrics of the completions alone are those of the rows with their prompts, to the last bit.

    A policy that is a table computes each column by itself, so only what the algorithm does with them could differ.
    """
    algorithm = ALGORITHMS[name]
    alone = credited(algorithm, rollout())
    whole = after_a_prompt(alone, 4)
    shared = share_prefix(whole, COLUMNS, 4)
    check_shapes(shared)
    assert shared.mask.shape == alone.mask.shape
    agree(learn(algorithm, shared, table_params()), learn(algorithm, whole, table_params()))


DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)


def of_decoder(name, update_of, sizes=None, group_size=2):
    """Gradient and metrics of a real update, on a mesh of 8 devices where there are sizes."""
    algorithm = ALGORITHMS[name]
    params = models.with_value_head(models.init(DECODER, jax.random.key(1)), DECODER)
    params["value_head"] = jnp.linspace(-1, 1, DECODER.hidden_size)
    state = state_of(params)
    batch = after_a_prompt(without_left_padding(credited(algorithm, rollout(vocabulary=16))), group_size)
    shardings = None
    if sizes is not None:
        shardings = state_shardings(make_mesh(*sizes), state, GRADIENT, models.logical_axes(DECODER, params))
        state = jax.device_put(state, shardings.state)
        batch = shard_rows(shardings, batch)
    objective = policy_objective(models.make_policy(DECODER), algorithm)
    state, metrics = update_of(objective, shardings)(state, batch)
    return jax.device_get((state.opt_state[0].trace, metrics))


@pytest.fixture(scope="module")
def unshared():
    return of_decoder("ppo + kl + entropy", lambda objective, _: make_update(objective, GRADIENT))


@pytest.mark.parametrize(("sizes", "micro_batches"), [(None, 1), (None, 4), ((2, 2, 2), 1), ((4, 1, 2), 2)])
def test_an_update_is_that_of_whole_rows(unshared, sizes, micro_batches):
    def update_of(objective, shardings):
        update = make_update(objective, GRADIENT, micro_batches, shardings)
        return make_shared_prefix_update(update, COLUMNS, 2, shardings)

    gradient, metrics = of_decoder("ppo + kl + entropy", update_of, sizes)
    assert metrics.pop("shared_prefix") == 1
    agree((gradient, metrics), unshared)
    apart = optax.tree.norm(jax.tree.map(np.subtract, gradient, unshared[0]))
    assert apart < 1e-5 * optax.tree.norm(unshared[0])


@pytest.mark.parametrize(("sizes", "tokens"), [(None, 12), (None, 200), ((2, 2, 2), 12)])
def test_an_update_of_packed_rows_is_that_of_whole_rows(sizes, tokens):
    """Rows of 12 columns hold a prompt of 3 with two or three of its four completions, of 2 to 5 each."""
    name = "ppo + kl + entropy"
    whole, metrics_of_whole = of_decoder(name, lambda objective, _: make_update(objective, GRADIENT), group_size=4)

    def update_of(objective, shardings):
        def make(micro_batches):
            return make_update(objective, GRADIENT, micro_batches, shardings)

        return make_packed_update(make, tokens, 12, shardings, SharedColumns(COLUMNS, 4))

    gradient, metrics = of_decoder(name, update_of, sizes, group_size=4)
    assert metrics["shared_prefix"] == 1
    agree((gradient, {name: metrics[name] for name in metrics_of_whole}), (whole, metrics_of_whole))
    apart = optax.tree.norm(jax.tree.map(np.subtract, gradient, whole))
    assert apart < 1e-5 * optax.tree.norm(whole)


def test_packed_completions_stand_after_their_prompt():
    """Two groups of three in rows of 12: a prompt of 3 with completions of 4 and 5, and again with one of 3."""
    lengths = np.array([4, 3, 5, 2, 4, 3])
    inside = np.arange(8)[None] < COLUMNS + lengths[:, None]
    prompts = np.arange(2).repeat(3)
    tokens = np.where(np.arange(9) < COLUMNS, 50 + prompts[:, None], np.arange(54).reshape(6, 9))
    chosen = inside & (np.arange(8) >= COLUMNS)
    traj = trajectory_of_tokens(
        tokens,
        np.pad(inside, ((0, 0), (1, 0)), constant_values=True).astype(int),
        np.pad(chosen, ((0, 0), (1, 0))),
        0.0 * tokens,
    )
    batch = Batch(traj=traj.replace(group=prompts), advantages=jnp.ones((6, 8)), mask=traj.mask)
    packed, _, added = pack_batch(batch, 12, rows=4, shared=SharedColumns(COLUMNS, 3))
    check_shapes(packed)
    assert added["shared_prefix"] == 1
    rows = np.asarray(packed.traj.segments)
    context = np.asarray(packed.traj.context)
    found = []
    for row in range(len(rows)):
        for segment in range(1, rows[row].max() + 1):
            columns = np.flatnonzero(rows[row] == segment)
            before = context[row, columns]
            assert len(set(before)) == 1
            prompt = np.flatnonzero(rows[row] == before[0]) if before[0] else columns[:0]
            assert not packed.mask[row, prompt].any()
            assert packed.traj.positions[row, columns].tolist() == [*range(len(prompt), len(prompt) + len(columns))]
            if len(prompt):
                assert packed.mask[row, columns].all()
                found.append(packed.traj.inputs[row, [*prompt, *columns]].tolist())
    assert sorted(found) == sorted(ids[own].tolist() for ids, own in zip(traj.inputs, inside, strict=True))
    assert (rows > 0).sum() < inside.sum()


def test_prompts_are_not_shared_where_that_takes_as_many_rows():
    """Nor where rows do not have them in common."""
    batch = after_a_prompt(without_left_padding(credited(ALGORITHMS["grpo"], rollout())), 2)
    plain, micro_batches, _ = pack_batch(batch, 15, rows=4)
    for columns in (SharedColumns(COLUMNS, 2), SharedColumns(COLUMNS, 4)):
        packed, same_micro_batches, added = pack_batch(batch, 15, rows=4, shared=columns)
        assert added["shared_prefix"] == 0
        assert micro_batches == same_micro_batches
        assert not packed.traj.context.any()
        np.testing.assert_array_equal(packed.traj.inputs, plain.traj.inputs)


def test_a_batch_without_a_decision_shares_nothing():
    batch = after_a_prompt(without_left_padding(credited(ALGORITHMS["grpo"], rollout())), 2)
    nothing = batch.replace(mask=batch.mask & False)
    packed, _, added = pack_batch(nothing, 15, rows=4, shared=SharedColumns(COLUMNS, 2))
    assert added == {"padding_before": 1.0, "padding_after": 1.0, "shared_prefix": 0.0}
    assert not packed.mask.any()


def test_groups_without_a_decision_and_rows_without_a_token_hold_no_prompt():
    """One prompt as wide as a packed row and without a completion, and a row of padding before one without a prompt."""
    first, length = np.array([0, 0, 2, 2, 0, 5]), np.array([0, 0, 3, 4, 0, 4])
    pieces = _bundles(first, length, 4, SharedColumns(4, 2))
    want = [[0, 2, 2, 2, 1], [0, 3, 4, 2, 0], [1, 2, 2, 2, 1], [1, 2, 4, 1, 0], [2, 5, 5, 4, 0]]
    assert np.stack(pieces, axis=1).tolist() == want


@pytest.mark.parametrize(
    "change",
    [
        lambda traj: traj.replace(inputs=traj.inputs.at[5, 1].add(1)),
        lambda traj: traj.replace(positions=traj.positions.at[5, 1].add(1)),
        lambda traj: traj.replace(segments=traj.segments.at[5, 1].set(0)),
        lambda traj: traj.replace(mask=traj.mask.at[4:6, 1].set(True)),
    ],
    ids=["a token", "a position", "padding", "a decision"],
)
def test_rows_that_do_not_share_are_updated_as_they_are(change):
    algorithm = ALGORITHMS["grpo"]
    batch = after_a_prompt(credited(algorithm, rollout()), 2)
    assert is_prefix_shared(batch.traj, COLUMNS, 2)
    width = batch.traj.inputs.shape[1]  # rows no wider than the prompt would be: an evaluation's, of shorter prompts
    assert not is_prefix_shared(batch.traj, width, 2)
    assert not is_prefix_shared(batch.traj, width + 1, 2)
    batch = batch.replace(traj=change(batch.traj))
    assert not is_prefix_shared(batch.traj, COLUMNS, 2)
    seen = []

    def update(state, batch):
        seen.append(batch)
        return state, {}

    _, metrics = make_shared_prefix_update(update, COLUMNS, 2)(None, batch)
    assert metrics == {"shared_prefix": 0.0}
    assert seen == [batch]
    make_shared_prefix_update(update, COLUMNS, 5)(None, batch)  # 16 rows are no groups of 5
    assert seen[1].traj.prefix is None


def test_rows_are_taken_one_by_one_with_their_prefix():
    batch = share_prefix(after_a_prompt(credited(ALGORITHMS["grpo"], rollout()), 2), COLUMNS, 2)
    own = with_own_prefixes(batch)
    np.testing.assert_array_equal(own.traj.prefix.inputs, batch.traj.prefix.inputs.repeat(2, axis=0))
    assert own.mask.shape == (16, T)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="columns = 0, group_size = 2; legal: at least 1 each"):
        make_shared_prefix_update(lambda state, batch: None, 0, 2)
    batch = share_prefix(after_a_prompt(credited(ALGORITHMS["grpo"], rollout()), 2), COLUMNS, 2)
    with pytest.raises(ValueError, match="a batch is packed before its prefixes are cut off"):
        pack_batch(batch, 9, rows=2)
    update = make_update(policy_objective(models.make_policy(DECODER), ALGORITHMS["grpo"]), GRADIENT, 16)
    with pytest.raises(ValueError, match="8 rows do not divide into 16 micro-batches"):
        update(state_of(models.init(DECODER, jax.random.key(1))), batch)


def pairs_after_prompts():
    """Eight pairs of completions, each after a prompt that both continue."""
    whole = after_a_prompt(credited(ALGORITHMS["sft"], rollout(vocabulary=16)), 2).traj.replace(group=None)
    whole = whole.replace(scores=None, baseline=None, reward_weights=None, ref_logp=whole.logp)
    return Pairs(jax.tree.map(lambda x: x[::2], whole), jax.tree.map(lambda x: x[1::2], whole))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_two_completions_of_a_pair_share_their_prompt(micro_batches):
    objective = dpo(models.make_policy(DECODER))
    params = models.init(DECODER, jax.random.key(1))
    pairs = pairs_after_prompts()

    def learn_from(pairs, wrapped):
        state, metrics = wrapped(make_update(objective, GRADIENT, micro_batches))(state_of(params), pairs)
        return jax.device_get((state.opt_state[0].trace, metrics))

    gradient, metrics = learn_from(pairs, lambda update: make_shared_prefix_update(update, COLUMNS, 1))
    assert metrics.pop("shared_prefix") == 1
    agree((gradient, metrics), learn_from(pairs, lambda update: update))


def test_pairs_of_other_prompts_or_widths_are_updated_as_they_are():
    pairs = pairs_after_prompts()
    assert is_prefix_of_pairs(pairs, COLUMNS)
    assert not is_prefix_of_pairs(pairs, COLUMNS + T)
    other = pairs.rejected.replace(inputs=pairs.rejected.inputs.at[3, 0].add(1))
    assert not is_prefix_of_pairs(pairs.replace(rejected=other), COLUMNS)
    narrow = jax.tree.map(lambda x: x[:, :-1], pairs.rejected)
    assert not is_prefix_of_pairs(pairs.replace(rejected=narrow), COLUMNS)
    assert not is_prefix_of_pairs(pairs.replace(gold=pairs.chosen), COLUMNS)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_annotation_that_shares_prompts(pieces, group_size):
    """Every field that annotation fills is that of whole rows, wherever there is a decision."""
    params = models.with_value_head(models.init(DECODER, jax.random.key(1)), DECODER)
    params["value_head"] = jnp.linspace(-1, 1, DECODER.hidden_size)
    state = state_of(params).replace(frozen={"reference": models.init(DECODER, jax.random.key(2))})
    annotate = models.make_annotate(models.make_policy(DECODER), ("ref_logp", "values", "old_logp"))
    traj = after_a_prompt(credited(ALGORITHMS["grpo"], rollout(vocabulary=16)), group_size).traj
    in_pieces = partial(make_shared_prefix_annotate, rows_at_once=len(traj.mask) // pieces)
    shared_traj = in_pieces(counted(annotate, calls := []), COLUMNS, group_size)(state, traj)
    assert [(call.prefix.inputs.shape[0], call.mask.shape[1]) for call in calls] == [
        (len(traj.mask) // group_size // pieces, T)
    ] * pieces
    whole = annotate(state, traj)
    for name in ("ref_logp", "values", "old_logp"):
        mask = jnp.pad(traj.mask, ((0, 0), (0, 1))) if name == "values" else traj.mask
        agree(jnp.where(mask, getattr(shared_traj, name), 0), jnp.where(mask, getattr(whole, name), 0))
        assert getattr(shared_traj, name).shape == getattr(whole, name).shape
    other_prompts = traj.replace(inputs=traj.inputs.at[1, 0].add(1))
    calls.clear()
    in_pieces(counted(annotate, calls), COLUMNS, 4)(state, other_prompts)
    assert [call.prefix for call in calls] == [None] * pieces


@pytest.mark.parametrize("columns", [0, COLUMNS])
@pytest.mark.parametrize("rows", [5, 16])
def test_any_number_of_rows_is_annotated_in_pieces_of_one_shape(rows, columns):
    """On eight devices too, over which they need not divide."""
    params = models.init(DECODER, jax.random.key(1))
    state = state_of(params).replace(frozen={"reference": models.init(DECODER, jax.random.key(2))})
    annotate = models.make_annotate(models.make_policy(DECODER), ("ref_logp", "old_logp"))
    traj = after_a_prompt(credited(ALGORITHMS["grpo"], rollout(vocabulary=16)), 1).traj
    traj = jax.tree.map(lambda x: x[:rows], traj)
    shardings = state_shardings(make_mesh(), state, GRADIENT, models.logical_axes(DECODER, params))
    found = {}
    for places, most in ((None, 3), (shardings, 8)):
        in_pieces = make_shared_prefix_annotate(counted(annotate, calls := []), columns, 1, most, places)
        found[most] = in_pieces(state, traj)
        assert len({call.mask.shape for call in calls}) == 1
        assert {len(call.mask) for call in calls} <= {2, 3, 8}
        assert len(calls) == -(-rows // most)
    whole = annotate(state, traj)
    for got in found.values():
        for name in ("ref_logp", "old_logp"):
            agree(jnp.where(traj.mask, getattr(got, name), 0), jnp.where(traj.mask, getattr(whole, name), 0))


def counted(annotate, calls):
    """`annotate`, which appends what it is called with."""

    def call(state, traj):
        calls.append(traj)
        return annotate(state, traj)

    return call
