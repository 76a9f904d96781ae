"""What clipping removes, for every algorithm: `clip_fraction` against the gradient itself, and none at first."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.algorithms.common.wrappers import with_needs
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig, language_model
from rljax.rollouts.sampler import sample
from rljax.train.objective import policy_objective
from rljax.types import PromptBatch, Sampling
from tests.algorithms.tiny import (
    ALGORITHMS,
    asked_for,
    credited,
    kinds_by_day,
    rollout,
    table_params,
    table_policy,
    with_defaults,
)

EVERY = pytest.mark.parametrize("name", ALGORITHMS)
OTHERS = {"kl": jnp.float32(0), "entropy": jnp.float32(0), "positive_nll": jnp.float32(0)}  # no other term has a slope
FACTORS = ("sampler_weight", "off_policy_kept", "high_entropy_kept")  # of the advantages; 0 takes the gradient too


@lru_cache
def table_output():
    """What the table's policy says of the rollout."""
    return table_policy(table_params(), {}, rollout())


@lru_cache
def prepared(name):
    """The batch of the rollout, with nothing in the loss but the policy's own terms."""
    algorithm = ALGORITHMS[name]
    batch = algorithm.credit(asked_for(algorithm, rollout()), OTHERS)
    objective = policy_objective(lambda params, frozen, traj: table_output(), algorithm)
    return objective.prepare({}, {}, batch, jax.random.key(0))


@EVERY
def test_clip_fraction_is_the_share_of_decisions_whose_gradient_the_clip_removed(name):
    algorithm, output, batch = ALGORITHMS[name], table_output(), prepared(name)

    def total(logp):
        terms, metrics = algorithm.loss(output.replace(logp=logp), batch)
        return jnp.where(batch.mask, terms, 0.0).sum(), metrics

    slope, metrics = jax.grad(total, has_aux=True)(jnp.where(batch.mask, output.logp, 0.0))
    factors = [metrics[factor] != 0 for factor in FACTORS if factor in metrics]
    learned = np.logical_and.reduce([batch.mask, batch.advantages != 0, *factors])
    removed = np.asarray(metrics.get("clip_fraction", jnp.zeros(batch.mask.shape))) > 0
    if name != "real":  # of a group whose completions are all good or all bad nothing is learned
        np.testing.assert_array_equal(removed[learned], slope[learned] == 0)
    assert not removed[np.asarray(batch.mask & (batch.advantages == 0))].any()
    parts = [metrics[f"clip_fraction_{part}"] for part in ("low", "high", "dual") if f"clip_fraction_{part}" in metrics]
    if parts and "dropped" not in metrics:
        np.testing.assert_array_equal(sum(parts), metrics["clip_fraction"])


def test_this_rollout_meets_every_clip():
    names = ("grpo", "gspo", "gmpo", "dppo_tv", "dppo_kl", "ppo, dual clip", "clip_cov")
    for name in names:
        algorithm, output, batch = ALGORITHMS[name], table_output(), prepared(name)
        _, metrics = algorithm.loss(output, batch)
        share = np.asarray(metrics["clip_fraction"])[np.asarray(batch.mask)].mean()
        assert 0 < share < 1, name
        if name == "ppo, dual clip":
            assert np.asarray(metrics["clip_fraction_dual"])[np.asarray(batch.mask)].any()


REGRESSIONS = ("sft", "dft", "a_star_po")  # right for samples of any policy
STEPS = ("trpo", "trpo_gae")  # one step within a trust region around the policy that sampled


@EVERY
def test_one_update_is_for_those_whose_loss_knows_no_policy_that_sampled(name):
    algorithm, output, batch = ALGORITHMS[name], table_output(), prepared(name)

    def slope(shift):
        moved = batch.traj.replace(logp=batch.traj.logp - shift)
        moved = moved.replace(old_logp=None if moved.old_logp is None else moved.old_logp - shift)
        other = batch.replace(traj=moved)
        return jax.grad(lambda logp: algorithm.loss(output.replace(logp=logp), other)[0].sum())(output.logp)

    has_ratio = bool(jnp.abs(slope(0.0) - slope(0.05)).max() > 0)
    if name == "real":
        has_ratio = True  # found in `prepare`
    assert algorithm.one_update == (name in STEPS or (not has_ratio and name not in REGRESSIONS))


def moved_by_the_sampler(algorithm):
    """Whether the gradient depends on the sampler's log-probs, where the policy before the update is annotated too."""
    algorithm = with_needs(algorithm, "old_logp")
    traj, output = rollout(), table_output()

    def slope(shift):
        seen = asked_for(algorithm, traj).replace(logp=traj.logp - shift)
        batch = algorithm.credit(seen, OTHERS)
        batch = policy_objective(lambda *_: output, algorithm).prepare({}, {}, batch, jax.random.key(0))

        def total(logp):
            return jnp.where(batch.mask, algorithm.loss(output.replace(logp=logp), batch)[0], 0.0).sum()

        return jax.grad(total)(jnp.where(batch.mask, output.logp, 0.0)), batch

    (plain, batch), (other, _) = slope(0.0), slope(0.3)
    by_advantage = jax.grad(lambda logp: jnp.where(batch.mask, of_half(algorithm, output, batch, logp), 0.0).sum())
    halved = by_advantage(jnp.where(batch.mask, output.logp, 0.0))
    return bool(jnp.abs(plain - other).max() > 1e-6), bool(jnp.abs(plain - halved).max() > 1e-6)


def of_half(algorithm, output, batch, logp):
    """The loss of half the advantages."""
    half = batch.replace(advantages=0.5 * batch.advantages)
    return algorithm.loss(output.replace(logp=logp), half)[0]


FILTERS = ("grpo + reject", "grpo + off-policy sequence mask")  # leave out what the sampler made, and weigh nothing


@pytest.mark.parametrize("name", kinds_by_day(ALGORITHMS))
def test_a_method_is_weighted_for_the_sampler_once_and_where_a_weight_is_felt(name):
    by_sampler, by_advantage = moved_by_the_sampler(ALGORITHMS[name])
    kind = ALGORITHMS[name].off_policy
    if by_sampler and name not in FILTERS:
        assert kind == "itself"
    if not by_advantage:
        assert kind != "weights"
    if kind == "itself" and name not in REGRESSIONS:
        assert by_sampler
    if kind == "never":
        assert not by_advantage or name == "otb"  # whose baseline is that of the policy that sampled


# -------------------------------------------------------------------------------------------------- the first update

DEFAULTS = ALGORITHMS | with_defaults(vars(a), {}) | {"vine_ppo": ALGORITHMS["vine_ppo"]}
DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)
# How far another program's bfloat16 log-probs are put from the policy's own; in float32 the sampler's are as they are.
NOISE = {"float32": 0.0, "bfloat16": 0.02}


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"])
def sampled(request):
    """(dtype, trajectory of a tiny decoder, its policy's own output): three programs of the same weights."""
    config = dataclasses.replace(DECODER, dtype=request.param)
    params = models.init(config, jax.random.key(0))
    rows = PromptBatch(np.full((4, 3), 2, np.int32), np.ones((4, 3), bool), np.arange(4), [{}] * 4, 0)
    traj = sample(language_model(config), params, {}, rows, Sampling(n=4, max_tokens=6, stop=(3,)), 0, 0)
    output = models.make_policy(config)(params, {}, traj)
    draw = np.random.default_rng(0)
    old = output.logp + jnp.float32(NOISE[request.param] * draw.normal(size=traj.mask.shape))
    shape, last = traj.mask.shape, np.asarray(traj.terminated | traj.truncated)
    facts = {
        "old_logp": old,
        "ref_logp": old,
        "teacher_logp": old,
        "rewards": jnp.float32(np.where(last, draw.normal(size=shape), 0.0)),
        "step_ends": jnp.asarray(last),
        "scores": jnp.float32(draw.normal(size=(shape[0], 2))),
        "baseline": jnp.float32(draw.normal(size=shape[0])),
        "values": jnp.zeros((shape[0], shape[1] + 1)),
        "sum_pi_squared": output.sum_pi_squared,
        "version": jnp.full(shape, 3),
        "reward_weights": jnp.ones((shape[0], 2)),
    }
    return request.param, traj.replace(**facts), output.replace(values=jnp.zeros(shape))


@pytest.mark.parametrize("name", kinds_by_day(DEFAULTS))
def test_the_first_update_on_identical_weights_clips_nothing(name, sampled):
    """In float32 against the sampler's log-probs; in bfloat16 against those of the trainer's own pass."""
    dtype, traj, output = sampled
    algorithm = DEFAULTS[name]
    given = asked_for(algorithm, traj)
    if dtype == "bfloat16":
        given = given.replace(old_logp=traj.old_logp)
    batch = algorithm.credit(given, {"at_old_policy": jnp.float32(1)})
    objective = policy_objective(lambda params, frozen, traj: output, algorithm)
    batch = objective.prepare({}, {}, batch, jax.random.key(0))
    _, metrics = objective.loss({}, {}, batch)
    clips = [key for key in metrics if key.startswith("clip_fraction")]
    if "dropped" in metrics:  # Clip-Cov drops by covariance, whatever the ratio is
        clips = ["clip_fraction_low", "clip_fraction_high"]
    assert not any(metrics[key][0] for key in clips)


def test_against_another_programs_log_probs_it_would():
    """What the law above would miss if nothing in it differed."""
    traj = credited(a.gspo(), rollout()).traj
    output = table_policy(table_params(), {}, traj)
    near = traj.replace(logp=output.logp + jnp.float32(0.02 * np.random.default_rng(0).normal(size=traj.mask.shape)))
    batch = a.gspo().credit(near, {})
    objective = policy_objective(lambda params, frozen, traj: output, a.gspo())
    batch = objective.prepare({}, {}, batch, jax.random.key(0))
    clipped, count = objective.loss({}, {}, batch)[1]["clip_fraction"]
    assert clipped > 0.3 * count
