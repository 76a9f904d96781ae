"""The update that keeps the mean KL within its bound, on a policy that is a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms import trpo, trpo_gae
from rljax.ops.trust_region import directed_kl
from rljax.train.objective import policy_objective
from rljax.train.trust_region import make_trust_region_update
from rljax.train.update import learn
from rljax.types import TrainState
from tests.algorithms.tiny import credited, rollout, table_params, table_policy

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
    assert metrics["sampler_gap"] < 1e-6
