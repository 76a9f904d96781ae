"""One optimizer step: donation, sums over micro-batches, any optax chain; and the walk over minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.models.decoder import DecoderConfig
from rljax.models.policy import init, make_policy
from rljax.train.mesh import make_mesh, shard_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.update import learn, make_update, map_micro_batches, minibatches
from rljax.types import Objective, TrainState
from tests.algorithms.tiny import ALGORITHMS, agree, credited, rollout, state_of, table_params, table_policy
from tests.compilations import count_compilations

ROWS = 12


def least_squares(params, frozen, batch):
    """½ Σ m (w·x + bias - y)², with metrics whose counts differ from row to row."""
    error = jnp.where(batch["mask"], batch["x"] @ params["w"] + frozen.get("bias", 0.0) - batch["y"], 0.0)
    count = batch["mask"].sum()
    metrics = {
        "error": (error.sum(), count),
        "error_max": (jnp.where(batch["mask"], error, -jnp.inf).max(), 1),
        "error_min": (jnp.where(batch["mask"], error, jnp.inf).min(), 1),
        "noise": (batch["noise"].sum(), batch["noise"].shape[0]),
    }
    return 0.5 * (batch["scale"] * error**2).sum(), metrics


def prepare(params, frozen, batch, key, map_rows):
    return batch | {"noise": jax.random.normal(key, (ROWS,))}


REGRESSION = Objective(prepare, least_squares)
draw = np.random.default_rng(0)
X, Y = draw.normal(size=(ROWS, 3)), draw.normal(size=ROWS)
MASK = np.array([1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0], bool)
W = np.array([0.5, -1.0, 2.0])
ERROR = np.where(MASK, X @ W - Y, 0.0)


def rows():
    return {"x": jnp.float32(X), "y": jnp.float32(Y), "mask": jnp.asarray(MASK), "scale": jnp.float32(3)}


def state(optimizer, **fields):
    params = {"w": jnp.float32(W)}
    return TrainState(step=0, params=params, opt_state=optimizer.init(params), key=jax.random.key(0), **fields)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6, 12])
def test_loss_metrics_and_step_are_those_of_the_whole_batch(micro_batches):
    new, metrics = make_update(REGRESSION, optax.sgd(0.1), micro_batches)(state(optax.sgd(0.1)), rows())
    gradient = 3 * X.T @ ERROR
    np.testing.assert_allclose(new.params["w"], W - 0.1 * gradient, rtol=1e-5)
    want = {
        "loss": 1.5 * (ERROR**2).sum(),
        "error": ERROR[MASK].mean(),
        "error_max": ERROR[MASK].max(),
        "error_min": ERROR[MASK].min(),
        "grad_norm": np.sqrt((gradient**2).sum()),
        "update_norm": 0.1 * np.sqrt((gradient**2).sum()),
    }
    assert metrics.keys() == want.keys() | {"noise"}
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_metric_of_no_decision_is_no_number(micro_batches):
    """And micro-batches without one count in no mean."""
    update = make_update(REGRESSION, optax.sgd(0.1), micro_batches)
    _, metrics = update(state(optax.sgd(0.1)), rows() | {"mask": jnp.zeros(ROWS, bool)})
    assert np.isnan(metrics["error"])
    assert (metrics["loss"], metrics["grad_norm"], np.isfinite(metrics["error_max"])) == (0, 0, False)
    _, metrics = update(state(optax.sgd(0.1)), rows() | {"mask": jnp.arange(ROWS) == 4})
    np.testing.assert_allclose(metrics["error"], (X @ W - Y)[4], rtol=1e-5)


def test_what_prepare_draws_is_one_draw_for_the_batch_and_another_for_the_next():
    seen = []
    for micro_batches in (1, 4):
        update, at = make_update(REGRESSION, optax.sgd(0.1), micro_batches), state(optax.sgd(0.1))
        for _ in range(2):
            at, metrics = update(at, rows())
            seen.append(float(metrics["noise"]))
    assert seen[0] != seen[1]
    np.testing.assert_allclose(seen[:2], seen[2:], rtol=1e-5)


def test_the_old_state_is_given_up_but_neither_frozen_nor_batch():
    optimizer = optax.adam(0.1)
    old, batch = state(optimizer, frozen={"bias": jnp.ones(ROWS)}), rows()
    new, _ = make_update(REGRESSION, optimizer)(old, batch)
    assert old.params["w"].is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt_state) if leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((old.frozen, batch, new.params)))
    assert new.frozen is old.frozen
    assert new.step == 0  # the loop counts


def test_frozen_is_not_differentiated():
    bias = jnp.float32(2.0)
    new, _ = make_update(REGRESSION, optax.sgd(0.1))(state(optax.sgd(0.1), frozen={"bias": bias}), rows())
    error = np.where(MASK, X @ W + 2.0 - Y, 0.0)
    np.testing.assert_allclose(new.params["w"], W - 0.3 * X.T @ error, rtol=1e-5)
    assert new.frozen["bias"] == 2.0


@pytest.mark.parametrize(("micro_batches", "legal"), [(5, r"\[1, 2, 3, 4, 6, 12\]"), (24, r"\[1, 2, 3, 4, 6, 12\]")])
def test_rows_that_do_not_divide_into_micro_batches_are_refused_with_the_legal_counts(micro_batches, legal):
    update = make_update(REGRESSION, optax.sgd(0.1), micro_batches)
    with pytest.raises(ValueError, match=rf"12 rows do not divide into {micro_batches} micro-batches; legal: {legal}"):
        update(state(optax.sgd(0.1)), rows())


CHAINS = {
    "adamw": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(1e-2, 0, 10))),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "hyperparameters": optax.inject_hyperparams(optax.lion)(learning_rate=1e-2),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "by part": optax.partition({"a": optax.adam(1e-2), "b": optax.set_to_zero()}, {"table": "a", "values": "b"}),
}


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("optimizer", CHAINS.values(), ids=CHAINS)
def test_any_optax_chain_steps_as_optax_says(optimizer, sizes):
    algorithm = ALGORITHMS["ppo"]
    objective, batch = policy_objective(table_policy, algorithm), credited(algorithm, rollout())
    shardings, at = None, state_of(table_params(), optimizer)
    if sizes:
        axes = {"table": ("embed", "mlp"), "values": ("vocabulary",)}
        shardings = state_shardings(make_mesh(*sizes), at, optimizer, axes)
        at = jax.device_put(at, shardings.state)
    update = make_update(objective, optimizer, 2, shardings)

    params = table_params()
    opt_state = optimizer.init(params)
    weighted = objective.prepare(params, {}, batch, None)

    @jax.jit
    def by_hand(params, opt_state):
        gradient = jax.grad(lambda p: objective.loss(p, {}, weighted)[0])(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(2):
        at, _ = update(at, batch)
        params, opt_state = by_hand(params, opt_state)
    agree(at.params, params, rounding=1e-6)
    assert jax.tree.structure(at.opt_state) == jax.tree.structure(opt_state)
    assert np.abs(at.params["table"] - table_params()["table"]).max() > 1e-3


def test_prepare_maps_over_rows_in_micro_batches():
    """Rows come back in their order and see only their micro-batch's scalars and rows."""
    rows = {"x": jnp.arange(24.0).reshape(12, 2), "scale": jnp.float32(3.0), "absent": None}
    seen = []

    def f(part):
        seen.append(part["x"].shape)
        return {"sum": part["scale"] * part["x"].sum(axis=1), "x": part["x"]}

    for pieces in (1, 3, 12):
        got = map_micro_batches(f, rows, pieces)
        np.testing.assert_array_equal(got["x"], rows["x"])
        np.testing.assert_array_equal(got["sum"], 3.0 * np.asarray(rows["x"]).sum(axis=1))
    assert set(seen) == {(12, 2), (4, 2), (1, 2)}


def test_on_a_mesh_one_program_serves_every_step():
    """The first state has arrays for `step` and `cursor`, those of the loop numbers."""
    axes, algorithm = {"table": ("embed", "mlp"), "values": (None,)}, ALGORITHMS["grpo"]
    shardings = state_shardings(make_mesh(2, 2, 2), state_of(table_params()), optax.sgd(1.0, momentum=0.0), axes)
    update = make_update(policy_objective(table_policy, algorithm), optax.sgd(1.0, momentum=0.0), 1, shardings)
    at = jax.device_put(state_of(table_params()), shardings.state)
    with count_compilations() as compiled:
        for step in range(3):
            at, _ = update(at, shard_rows(shardings, credited(algorithm, rollout(step))))
            assert at.step == step
            at = at.replace(step=step + 1, cursor=5 * step)
    assert compiled["step"] == 1


def numbered():
    return {"row": jnp.arange(ROWS), "cells": jnp.arange(ROWS * 2).reshape(ROWS, 2), "scalar": jnp.float32(7)}


def test_without_a_mesh_too():
    """A decoder as `init` makes it: its numbers and those of an update are of one type, and lie as freely."""
    config, optimizer = DecoderConfig(17, 8, 1, 2, 1, 4, 8, qkv_bias=True), optax.adamw(1e-3)
    at = state_of(init(config, jax.random.key(0)), optimizer)
    update = make_update(policy_objective(make_policy(config), ALGORITHMS["grpo"]), optimizer)
    with count_compilations() as compiled:
        for step in range(3):
            at, _ = update(at, credited(ALGORITHMS["grpo"], rollout(step)))
    assert compiled["step"] == 1


def test_only_the_first_update_of_a_rollout_is_at_the_old_policy():
    """And its share of clipped decisions is a metric of its own."""
    seen = []

    def update(state, batch):
        seen.append(float(batch.coefficients["at_old_policy"]))
        return state, {"clip_fraction": jnp.float32(len(seen))}

    batch = credited(ALGORITHMS["grpo"], rollout())
    _, metrics = learn(update, state_of(table_params()), batch, epochs=2, num_minibatches=2, at_old_policy=True)
    assert seen == [1, 0, 0, 0]
    assert (metrics["clip_fraction_first"], metrics["clip_fraction"]) == (1, 2.5)


def test_minibatches_hold_every_row_once_an_epoch_in_another_order_each():
    key = jax.random.key(3)
    minis = list(minibatches(key, numbered(), epochs=3, num_minibatches=4))
    assert len(minis) == 12
    epochs = [np.concatenate([mini["row"] for mini in minis[4 * e : 4 * e + 4]]) for e in range(3)]
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order), np.arange(ROWS))
    assert len({tuple(order) for order in epochs}) == 3
    for mini in minis:
        np.testing.assert_array_equal(mini["cells"][:, 0], 2 * mini["row"])  # whole rows
        assert mini["scalar"] == 7
    again = list(minibatches(key, numbered(), epochs=3, num_minibatches=4))
    np.testing.assert_array_equal(epochs[2], np.concatenate([mini["row"] for mini in again[8:]]))


def test_one_minibatch_is_the_batch_itself():
    batch = numbered()
    assert [mini is batch for mini in minibatches(jax.random.key(0), batch, epochs=2)] == [True, True]


def test_rows_that_do_not_divide_into_minibatches_are_refused_with_the_legal_counts():
    with pytest.raises(ValueError, match=r"12 rows do not divide into 5 minibatches; legal: \[1, 2, 3, 4, 6, 12\]"):
        next(minibatches(jax.random.key(0), numbered(), num_minibatches=5))


def test_learn_makes_all_updates_of_a_rollout_and_averages_what_they_say():
    gaps, losses = iter([0.5, 2.0, 1.0, 0.25]), iter([4.0, 3.0, 2.0, 1.0])
    seen = []

    def update(state, mini):
        seen.append(np.asarray(mini["row"]))
        return state.replace(extra=state.extra + 1), {"loss": next(losses), "logp_diff_max": next(gaps)}

    at, metrics = learn(update, state(optax.sgd(0.1), extra=0), numbered(), epochs=2, num_minibatches=2)
    assert at.extra == 4
    assert metrics == {"loss": 2.5, "logp_diff_max": 2.0, "sampler_gap": 0.5}
    np.testing.assert_array_equal(np.sort(np.concatenate(seen[:2])), np.arange(ROWS))


@pytest.mark.parametrize(("limit", "updates"), [(None, 6), (0.35, 4), (0.05, 1), (9.0, 6)])
@pytest.mark.parametrize(("name", "others"), [("kl_behavior", {}), ("kl_old", {"kl_behavior": 5.0})])
def test_learn_stops_after_the_update_that_found_the_policy_too_far(limit, updates, name, others):
    """From the policy that ratios are to: of stale samples the sampler is far before the first update."""
    found = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])

    def update(state, mini):
        return state.replace(extra=state.extra + 1), {name: next(found)} | others

    at, metrics = learn(update, state(optax.sgd(0.1), extra=0), numbered(), epochs=3, num_minibatches=2, stop_kl=limit)
    assert at.extra == updates
    assert metrics[name] == pytest.approx(np.arange(1, updates + 1).mean() / 10)
    assert metrics.get("updates") == (None if limit is None else updates)


def test_a_limit_of_a_kl_that_nothing_measures_is_refused():
    def update(state, mini):
        return state, {"loss": 0.0}

    with pytest.raises(ValueError, match="stop_kl compares with the metric kl_old or kl_behavior"):
        learn(update, state(optax.sgd(0.1), extra=0), numbered(), stop_kl=1.0)
