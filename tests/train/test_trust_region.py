"""The update that keeps the mean KL within its bound, on a policy that is a table."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rljax.algorithms import trpo, trpo_gae
from rljax.algorithms.common.wrappers import with_needs
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig, forward, language_model, logits
from rljax.ops.shaping import at_last_decision
from rljax.ops.trust_region import directed_kl
from rljax.rollouts.sampler import sample
from rljax.train.mesh import make_mesh, shard_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.packing import make_packed_update
from rljax.train.trust_region import make_trust_region_update
from rljax.train.update import learn
from rljax.types import PromptBatch, Sampling, TrainState
from tests.algorithms.tiny import GRADIENT, LOGP, credited, rollout, state_of, table_params, table_policy

DELTA = 0.01


def divergence(params, old, frozen, traj):
    logits = [x["table"][traj.inputs] / traj.temperature[..., None] for x in (old, params)]
    return directed_kl(*logits)


def on_policy(algorithm, seed=0):
    traj = rollout(seed)
    logp = table_policy(table_params(), {}, traj).logp
    return credited(algorithm, traj.replace(logp=logp, old_logp=None))


def state():
    return TrainState(0, jax.tree.map(jnp.copy, table_params()), (), jax.random.key(0))


def updating(algorithm, **settings):
    return make_trust_region_update(policy_objective(table_policy, algorithm), divergence, DELTA, **settings)


@pytest.fixture(scope="module")
def update():
    return updating(trpo(), damping=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_kl_stays_within_delta_and_the_surrogate_falls(update, seed):
    batch, objective = on_policy(trpo(), seed), policy_objective(table_policy, trpo())
    new, metrics = update(state(), batch)
    assert metrics["accepted"] == 1
    prepared = objective.prepare(state().params, {}, batch, None)
    mask = np.asarray(batch.mask)
    kl = np.asarray(divergence(new.params, table_params(), {}, batch.traj))[mask].mean()
    before, after = (objective.loss(params, {}, prepared)[0] for params in (table_params(), new.params))
    assert metrics["kl_step"] <= DELTA
    np.testing.assert_allclose(metrics["kl_step"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["improvement"], before - after, rtol=1e-3)
    assert 0 < metrics["improvement"] < 1.5 * metrics["improvement_expected"]
    assert metrics["kl_step"] > 0.3 * DELTA
    np.testing.assert_array_equal(new.params["values"], table_params()["values"])


def test_the_step_does_not_depend_on_micro_batches(update):
    batch = on_policy(trpo())
    whole, _ = update(state(), batch)
    cut, metrics = updating(trpo(), damping=1e-3, micro_batches=4)(state(), batch)
    np.testing.assert_allclose(cut.params["table"], whole.params["table"], rtol=1e-4, atol=1e-5)
    assert metrics["kl_step"] <= DELTA


def test_the_fisher_matrix_may_be_that_of_some_rows():
    _, metrics = updating(trpo(), damping=1e-3, fisher_every=4)(state(), on_policy(trpo()))
    assert metrics["kl_step"] <= DELTA
    assert metrics["accepted"] == 1


def test_a_failed_search_keeps_the_parameters_and_says_so(update):
    batch = on_policy(trpo())
    new, metrics = update(state(), batch.replace(advantages=jnp.zeros_like(batch.advantages)))
    assert (metrics["accepted"], metrics["kl_step"], metrics["improvement"]) == (0, 0, 0)
    assert metrics["line_search_trials"] == 10
    for name, x in table_params().items():
        np.testing.assert_array_equal(new.params[name], x)


def test_a_critic_beside_the_policy_stands_still():
    new, metrics = updating(trpo_gae(), damping=1e-3)(state(), on_policy(trpo_gae()))
    assert metrics["accepted"] == 1
    np.testing.assert_array_equal(new.params["values"], table_params()["values"])


def test_it_is_an_update_like_any_other(update):
    _, metrics = learn(update, state(), on_policy(trpo()))
    assert metrics["sampler_gap"] < LOGP


def test_a_step_is_accepted_where_the_policy_before_it_is_annotated(update):
    """A candidate of the line search is compared with that policy, not with itself."""
    algorithm, batch = with_needs(trpo(), "old_logp"), on_policy(trpo())
    batch = batch.replace(traj=batch.traj.replace(old_logp=batch.traj.logp))
    want, _ = update(state(), on_policy(trpo()))
    new, metrics = learn(updating(algorithm, damping=1e-3), state(), batch, at_old_policy=True)
    assert metrics["accepted"] == 1
    np.testing.assert_allclose(new.params["table"], want.params["table"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_either_direction_of_the_kl_may_be_bounded(direction):
    """Step after step, which are large: the two directions differ."""

    def bounded(params, old, frozen, traj):
        logits = [x["table"][traj.inputs] / traj.temperature[..., None] for x in (old, params)]
        return directed_kl(*logits, direction)

    objective = policy_objective(table_policy, trpo())
    update, now = make_trust_region_update(objective, bounded, 0.3, 1e-3), state()
    for seed in range(5):
        traj = rollout(seed)
        logp = table_policy(now.params, {}, traj).logp
        batch, old = credited(trpo(), traj.replace(logp=logp, old_logp=None)), jax.device_get(now.params["table"])
        now, metrics = update(now, batch)
        pair = (old, now.params["table"]) if direction == "old_new" else (now.params["table"], old)
        p, q = (log_softmax(x[batch.traj.inputs] / batch.traj.temperature[..., None], -1) for x in pair)
        kl = (np.exp(p) * (p - q)).sum(-1)[np.asarray(batch.mask)].mean()
        np.testing.assert_allclose(metrics["kl_step"], kl, rtol=1e-3)
        assert metrics["accepted"] == 1
        assert 0.03 < metrics["kl_step"] <= 0.3


def test_rows_of_the_fisher_matrix_need_not_divide():
    """Every third of sixteen rows is six, in four pieces: the same step as in one."""
    whole, want = updating(trpo(), damping=1e-3, fisher_every=3)(state(), on_policy(trpo()))
    cut, metrics = updating(trpo(), damping=1e-3, fisher_every=3, micro_batches=4)(state(), on_policy(trpo()))
    assert metrics["accepted"] == want["accepted"] == 1
    np.testing.assert_allclose(cut.params["table"], whole.params["table"], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- a language model

DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)
POLICY = models.make_policy(DECODER)
STOP = 3


def drawn(params, step):
    """Four answers to each of four prompts, their texts of many lengths; the reward is the share of one token."""
    rows = PromptBatch(
        np.full((4, 3), 2, np.int32), np.arange(3) >= np.array([[0], [1], [2], [0]]), np.arange(4), [{}] * 4, 0
    )
    traj = sample(language_model(DECODER), params, {}, rows, Sampling(n=4, max_tokens=5, stop=(STOP,)), 0, step)
    reward = ((traj.actions == 5) & traj.mask).sum(axis=1) / traj.mask.sum(axis=1)
    return trpo().credit(traj.replace(rewards=at_last_decision(reward, traj.mask)), {}), float(reward.mean())


@jax.jit
def log_pi(params, traj):
    hidden, _ = forward(DECODER, params["decoder"], traj.inputs, traj.positions, traj.segments)
    return jax.nn.log_softmax(logits(DECODER, params["decoder"], hidden))


@pytest.fixture(scope="module")
def lm_update():
    """Three products: with ten, conjugate gradients in float32 make a difference of 1 % of rounding."""
    objective = policy_objective(POLICY, trpo())
    make = partial(make_trust_region_update, objective, models.make_divergence(DECODER), DELTA, iterations=3)
    return make, make()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_language_model_learns_within_the_bound(lm_update, seed):
    """Thirty steps; the KL computed anew from the distributions before and after each."""
    now, rewards = state_of(models.init(DECODER, jax.random.key(seed))), []
    for step in range(30):
        batch, reward = drawn(now.params, step)
        old = np.float64(log_pi(now.params, batch.traj))
        now, metrics = lm_update[1](now, batch)
        new = np.float64(log_pi(now.params, batch.traj))
        kl = (np.exp(old) * (old - new)).sum(-1)[np.asarray(batch.mask)].mean()
        np.testing.assert_allclose(metrics["kl_step"], kl, rtol=1e-2, atol=1e-6)
        assert metrics["kl_step"] <= DELTA
        assert kl <= DELTA * 1.001
        moved = reward > 0  # where all rewards are 0 there is no way to go
        assert (kl > 0, metrics["accepted"]) == (moved, moved)
        rewards.append(reward)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_a_language_models_step_is_the_same_however_its_rows_are_cut(lm_update):
    """Packed too, in micro-batches of a mesh of eight devices."""
    make, update = lm_update
    params = models.init(DECODER, jax.random.key(1))
    start, (batch, _) = jax.device_get(params), drawn(params, 0)
    shardings = state_shardings(make_mesh(2, 2, 2), state_of(params), GRADIENT, models.logical_axes(DECODER, params))
    elsewhere = make_packed_update(lambda n: make(micro_batches=n, shardings=shardings), 7, 7, shardings)
    want, metrics = update(state_of(params), batch)
    got, cut = elsewhere(jax.device_put(state_of(start), shardings.state), shard_rows(shardings, batch))
    assert cut["micro_batches"] > 1
    for name in ("kl_step", "improvement", "improvement_expected", "loss", "line_search_trials"):
        np.testing.assert_allclose(cut[name], metrics[name], rtol=1e-3, atol=1e-6)
    change, moved = (jax.tree.map(np.subtract, jax.device_get(x.params), start) for x in (want, got))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5), moved, change)
