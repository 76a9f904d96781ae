"""Laws that every algorithm obeys, whatever its equation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import make_mesh, place_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from tests.algorithms.tiny import (
    ALGORITHMS,
    GRADIENT,
    agree,
    credited,
    learn,
    rollout,
    state_of,
    table_params,
    table_policy,
)

EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
BY_GROUP = [name for name in ALGORITHMS if name.startswith("grpo") or name.endswith(("group mean", "leave one out"))]


def only(*names):
    return pytest.mark.parametrize("algorithm", [ALGORITHMS[name] for name in names], ids=names)


@EVERY
def test_micro_batches_change_neither_gradient_nor_metrics(algorithm):
    batch = credited(algorithm, rollout())
    whole = learn(algorithm, batch, table_params())
    assert np.abs(whole[0]["table"]).max() > 1e-3
    for count in (2, 4):
        agree(learn(algorithm, batch, table_params(), micro_batches=count), whole)


DECODER = DecoderConfig(vocabulary=16, width=8, layers=1, heads=4, kv_heads=2, head_dim=4, mlp_width=16)


def decoder(mesh_sizes):
    """A decoder with a value head and its shardings on a mesh of 8 devices; None: one device."""
    params = models.with_value_head(models.init(DECODER, jax.random.key(1)), DECODER)
    params["value_head"] = jnp.linspace(-1, 1, DECODER.width)
    if mesh_sizes is None:
        return params, None
    axes = models.logical_axes(DECODER, params)
    return params, state_shardings(make_mesh(*mesh_sizes), state_of(params), GRADIENT, axes)


@pytest.fixture(scope="module")
def on_one_device():
    algorithm = ALGORITHMS["ppo + kl + entropy"]
    return learn(
        algorithm, credited(algorithm, rollout(vocabulary=16)), *decoder(None)[:1], models.make_policy(DECODER)
    )


MESHES = {(8, 1, 1): 1, (1, 8, 1): 2, (4, 2, 1): 1, (2, 4, 1): 2, (1, 2, 4): 1, (2, 2, 2): 2}


@pytest.mark.parametrize(("sizes", "micro_batches"), MESHES.items(), ids=lambda s: str(s).replace(", ", "x"))
def test_a_mesh_changes_neither_gradient_nor_metrics(on_one_device, sizes, micro_batches):
    algorithm = ALGORITHMS["ppo + kl + entropy"]
    params, shardings = decoder(sizes)
    batch = credited(algorithm, rollout(vocabulary=16), shardings)
    got = learn(algorithm, batch, params, models.make_policy(DECODER), micro_batches, shardings)
    agree(got, on_one_device)


@EVERY
def test_every_algorithm_is_the_same_on_a_mesh(algorithm):
    axes = {"table": ("embed", "mlp"), "values": (None,)}
    shardings = state_shardings(make_mesh(2, 2, 2), state_of(table_params()), GRADIENT, axes)
    sharded = learn(algorithm, credited(algorithm, rollout(), shardings), table_params(), shardings=shardings)
    agree(sharded, learn(algorithm, credited(algorithm, rollout()), table_params()))


def spoil(x, mask, garbage):
    """Every [B T] fact with garbage wherever the mask is False."""
    facts = {}
    for name, value in vars(x).items():
        if name in ("mask", "traj", "inputs", "actions", "positions", "segments") or np.ndim(value) != 2:
            continue
        keep = jnp.pad(mask, ((0, 0), (0, value.shape[1] - mask.shape[1])), constant_values=True)
        facts[name] = jnp.where(keep, value, True if value.dtype == bool else garbage)
    return x.replace(**facts)


@EVERY
@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_what_stands_at_masked_columns_changes_nothing(algorithm, garbage):
    traj = rollout()
    clean = learn(algorithm, credited(algorithm, traj), table_params())
    batch = credited(algorithm, spoil(traj, traj.mask, garbage))
    batch = spoil(batch.replace(traj=spoil(batch.traj, batch.mask, garbage)), batch.mask, garbage)
    assert not np.isfinite(batch.advantages).all() or garbage == 1e30
    chex.assert_trees_all_equal(learn(algorithm, batch, table_params()), clean)


@EVERY
def test_what_the_policy_says_of_masked_columns_changes_nothing(algorithm):
    """As of padding, where attention sees nothing. Garbage is added, so that a careless mask would pass it back."""

    def careless(params, frozen, traj):
        garbage = jnp.where(traj.mask, 0.0, jnp.nan)
        return jax.tree.map(lambda x: x + garbage, table_policy(params, frozen, traj))

    batch = credited(algorithm, rollout())
    agree(learn(algorithm, batch, table_params(), careless), learn(algorithm, batch, table_params()))


@EVERY
def test_row_order_and_the_names_of_groups_do_not_matter(algorithm):
    traj, order = rollout(), np.random.default_rng(0).permutation(16)
    straight = credited(algorithm, traj)
    other = jax.tree.map(lambda x: x[order], traj)
    mixed = credited(algorithm, other.replace(group=1000 - 3 * other.group))
    agree(mixed.advantages, straight.advantages[order])
    agree(learn(algorithm, mixed, table_params()), learn(algorithm, straight, table_params()))


def own_gradient(algorithm, batch, table, entropy_coefficient):
    """Σ w Â (p - onehot)/τ, in float64, less c times the gradient of the entropy."""
    weight = np.float64(algorithm.weights(batch.mask, batch.traj.segments))
    state, action, tau = (np.asarray(x) for x in (batch.traj.inputs, batch.traj.actions, batch.traj.temperature))
    want = np.zeros_like(table)
    for b, t in zip(*np.nonzero(batch.mask), strict=True):
        z = table[state[b, t]] / tau[b, t]
        p = np.exp(z) / np.exp(z).sum()
        by_logits = np.float64(batch.advantages[b, t]) * (p - np.eye(len(p))[action[b, t]])
        by_logits += entropy_coefficient * p * (np.log(p) - (p * np.log(p)).sum())
        want[state[b, t]] += weight[b, t] * by_logits / tau[b, t]
    return want


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_the_gradient_is_the_policy_gradient_of_its_own_advantages(name):
    """With the reference equal to the policy too, so that the KL term has no slope."""
    algorithm, params, traj = ALGORITHMS[name], table_params(), rollout()
    logp = table_policy(params, {}, traj).logp
    batch = credited(algorithm, traj.replace(logp=logp, ref_logp=logp))
    gradient, metrics = learn(algorithm, batch, params)
    want = own_gradient(algorithm, batch, np.float64(params["table"]), 0.2 if "entropy" in name else 0.0)
    agree(gradient["table"], want)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-6)
    assert metrics["logp_change_max"] < 1e-6


@only(*(name for name in ALGORITHMS if name != "sft" and "+" not in name))
def test_without_advantage_the_policy_does_not_move(algorithm):
    batch = credited(algorithm, rollout())
    gradient, _ = learn(algorithm, batch.replace(advantages=jnp.zeros_like(batch.advantages)), table_params())
    assert not gradient["table"].any()


@only(*BY_GROUP)
@pytest.mark.parametrize("reward", [1.0, 0.1, 1 / 3, -1000.1])
def test_equal_rewards_are_no_signal_to_the_last_bit(algorithm, reward):
    traj = rollout()
    lone = (traj.group == 2)[:, None]  # with leave_one_out a group of one has nothing to compare with
    rewards = jnp.where((traj.rewards != 0) & ~lone, jnp.float32(reward), 0.0)
    assert not credited(algorithm, traj.replace(rewards=rewards)).advantages.any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_without_decisions_or_judgement_are_as_if_they_were_not_there(name):
    algorithm, traj = ALGORITHMS[name], rollout()
    gone = [3] if name == "sft" else [3, 7]  # a demonstration needs no judgement
    kept = jax.tree.map(lambda x: np.delete(x, gone, axis=0), traj)
    whole, less = credited(algorithm, traj), credited(algorithm, kept)
    agree(np.delete(whole.advantages, gone, axis=0), less.advantages)
    agree(learn(algorithm, whole, table_params()), learn(algorithm, less, table_params()))


@EVERY
def test_a_batch_of_nothing_gives_no_gradient_and_no_nan(algorithm):
    traj = rollout()
    gradient, metrics = learn(algorithm, credited(algorithm, traj.replace(mask=traj.mask & False)), table_params())
    assert not any(x.any() for x in gradient.values())
    assert metrics["loss"] == 0


@EVERY
def test_jit_changes_nothing_but_rounding(algorithm):
    objective, batch = policy_objective(table_policy, algorithm), credited(algorithm, rollout())

    def value_and_gradient(batch):
        batch = objective.prepare(table_params(), {}, batch, jax.random.key(0))
        return jax.value_and_grad(lambda params: objective.loss(params, {}, batch), has_aux=True)(table_params())

    with jax.disable_jit():
        plain = value_and_gradient(batch)
    agree(jax.jit(value_and_gradient)(batch), plain)


@EVERY
def test_one_trace_serves_all_steps_and_all_values_of_the_coefficients(algorithm):
    update = make_update(policy_objective(table_policy, algorithm), GRADIENT, micro_batches=2)
    state = state_of(table_params())
    for step in range(3):
        batch = credited(algorithm, rollout(seed=step))
        coefficients = {"kl": jnp.float32(0.1 * step), "entropy": jnp.float32(0.5 - 0.1 * step)}
        state, _ = update(state, batch.replace(coefficients=coefficients))
        state = state.replace(step=step + 1, cursor=7 * step)
    assert update.jitted._cache_size() == 1


def test_rows_are_spread_over_the_mesh_and_scalars_copied():
    _, shardings = decoder((2, 2, 2))
    batch = place_rows(shardings, credited(ALGORITHMS["ppo"], rollout()).replace(coefficients={"kl": jnp.float32(0)}))
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch) if leaf.ndim} == {4}
    assert batch.coefficients["kl"].sharding.is_fully_replicated
