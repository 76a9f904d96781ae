"""Updates in a scan are the updates of the Python loop; decisions become rows of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algorithms import ppo
from rljax.models import mlp
from rljax.train.compiled import decisions, follow, of_part, permutations, scan_updates
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import TrainState, Trajectory, check_shapes

B, T = 4, 6


def batch_and_state():
    rng = np.random.default_rng(0)
    params = mlp.init(jax.random.key(0), 3, 2, 8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    traj = Trajectory(
        inputs=draw(B, T, 3),
        actions=jnp.asarray(rng.integers(0, 2, (B, T))),
        logp=jnp.full((B, T), -0.7),
        mask=jnp.asarray(rng.random((B, T)) < 0.9),
        rewards=draw(B, T),
        values=draw(B, T + 1),
    )
    algorithm, optimizer = ppo(), optax.adam(1e-2)
    update = make_update(policy_objective(mlp.make_mlp_policy(), algorithm), optimizer)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(1))
    return algorithm.credit(traj, {}), state, update


def test_every_decision_is_a_row_and_the_loss_is_the_same():
    batch, state, update = batch_and_state()
    alone = decisions(batch)
    check_shapes(alone)
    for b, t in ((0, 0), (1, 5), (3, 2)):
        assert alone.advantages[b * T + t, 0] == batch.advantages[b, t]
        assert (alone.traj.values[b * T + t] == batch.traj.values[b, t : t + 2]).all()
        assert (alone.traj.inputs[b * T + t, 0] == batch.traj.inputs[b, t]).all()
    losses = [float(update(jax.tree.map(jnp.copy, state), each)[1]["loss"]) for each in (batch, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_one_pass_of_one_update_is_that_update():
    batch, state, update = batch_and_state()
    expected, metrics = update(jax.tree.map(jnp.copy, state), batch)
    scanned, kept = jax.jit(lambda s: scan_updates(update, s, batch, keep=("loss",)))(state)
    for mine, other in zip(jax.tree.leaves(scanned.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    np.testing.assert_allclose(kept["loss"], metrics["loss"], rtol=1e-5)
    assert kept.keys() == {"loss"}


def test_each_pass_takes_every_row_once():
    """A counter in place of the update: it adds up the rows it is given."""
    batch, state, _ = batch_and_state()
    rows = decisions(batch)
    rows = rows.replace(returns=jnp.arange(1.0, B * T + 1)[:, None])

    def update(state, mini):
        seen = state.params.at[mini.returns[:, 0].astype(jnp.int32) - 1].add(1.0)
        return state.replace(params=seen), {"rows": mini.returns.shape[0] * jnp.ones(())}

    counting = state.replace(params=jnp.zeros(B * T))
    after, kept = scan_updates(update, counting, rows, epochs=3, count=4, keep=("rows",))
    assert (after.params == 3).all()
    assert float(kept["rows"]) == B * T / 4
    with pytest.raises(
        ValueError, match=r"24 rows do not divide into 5 minibatches; legal: \[1, 2, 3, 4, 6, 8, 12, 24\]"
    ):
        scan_updates(update, counting, rows, count=5)


def test_permutations_are_uniform():
    orders = np.asarray(permutations(jax.random.key(0), 24_000, 4))
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # χ² of 23 degrees of freedom: 49.7 at 0.999
    assert (np.sort(np.asarray(permutations(jax.random.key(0), 2, 37)), axis=1) == np.arange(37)).all()


def test_a_part_is_trained_alone():
    batch, state, _ = batch_and_state()
    optimizer = optax.adam(1e-2)
    update = make_update(policy_objective(mlp.make_mlp_policy(), ppo()), optimizer)
    opt_state = {name: optimizer.init({name: part}) for name, part in state.params.items()}
    before = jax.tree.map(jnp.copy, state.params)
    after, _ = of_part(update, "critic")(state.replace(opt_state=opt_state), batch)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after.params)
    assert all(jax.tree.leaves(same["actor"]))
    assert not all(jax.tree.leaves(same["critic"]))
    assert int(after.opt_state["critic"][0].count) == 1
    assert int(after.opt_state["actor"][0].count) == 0


def test_a_target_network_follows_by_its_share_where_that_is_due():
    target, params = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([8.0, 0.0])}
    assert follow(target, params)["w"].tolist() == [8, 0]
    assert follow(target, params, 0.25)["w"].tolist() == [2, 3]
    assert follow(target, params, 0.25, due=False)["w"].tolist() == [0, 4]
    twice = follow(follow(target, params, 0.25), params, 0.25)
    np.testing.assert_allclose(twice["w"], [8 * (1 - 0.75**2), 4 * 0.75**2], rtol=1e-6)
