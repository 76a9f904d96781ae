"""Completions of a mixture of two policies: their log-probs are the mixture's at every state."""

import dataclasses

import jax
import numpy as np
import pytest

from rljax.models import decoder, policy
from rljax.models.lora import LoraConfig
from rljax.models.mixtures import arithmetic_mixture, geometric_mixture
from rljax.rollouts.sampler import sample
from rljax.types import Sampling
from tests.ops.test_distillation import softmax
from tests.rollouts.common import CONFIG, make_params, make_rows

OTHER_CONFIG = decoder.DecoderConfig(53, 16, 1, 2, 1, 8, 24)
SAMPLING = Sampling(n=2, max_tokens=5, stop=(3,))


@pytest.fixture(scope="module")
def params():
    return make_params()


def log_probs(config, parameters, traj):
    hidden, _ = decoder.forward(config, parameters["decoder"], traj.inputs, traj.positions, traj.segments)
    return np.log(softmax(np.float64(decoder.logits(config, parameters["decoder"], hidden))))


def chosen(logp, traj):
    return np.take_along_axis(logp, np.asarray(traj.actions)[..., None], axis=-1)[..., 0][np.asarray(traj.mask)]


def normalized(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("max_concurrent", [None, 3])
def test_the_opponent_of_nash_md_is_the_geometric_mixture(params, max_concurrent):
    reference = policy.init(CONFIG, jax.random.key(4))
    sampling = SAMPLING.replace(max_concurrent=max_concurrent)
    traj = sample(geometric_mixture(CONFIG, 0.25), params, {"reference": reference}, make_rows([3, 5]), sampling, 0, 0)
    own, other = log_probs(CONFIG, params, traj), log_probs(CONFIG, reference, traj)
    np.testing.assert_allclose(
        np.asarray(traj.logp)[np.asarray(traj.mask)], chosen(normalized(0.75 * own + 0.25 * other), traj), atol=1e-4
    )
    assert np.abs(chosen(own, traj) - chosen(other, traj)).max() > 0.1


def test_a_share_of_each_token_is_the_teachers(params):
    teacher = policy.init(OTHER_CONFIG, jax.random.key(4))
    model = arithmetic_mixture(CONFIG, 0.2, other_config=OTHER_CONFIG)
    traj = sample(model, params, {"teacher": teacher}, make_rows([3, 5]), SAMPLING, 0, 0)
    own, other = log_probs(CONFIG, params, traj), log_probs(OTHER_CONFIG, teacher, traj)
    want = np.log(0.8 * np.exp(own) + 0.2 * np.exp(other))
    np.testing.assert_allclose(np.asarray(traj.logp)[np.asarray(traj.mask)], chosen(want, traj), atol=1e-4)


def test_beside_an_adapter_a_teacher_is_its_own_parameters_alone(params):
    teacher = {"teacher": policy.init(OTHER_CONFIG, jax.random.key(4))}
    adapted = dataclasses.replace(CONFIG, adapter=LoraConfig(rank=2))
    trained, base = policy.with_adapter(params, adapted, jax.random.key(1))
    found, want = (
        jax.eval_shape(arithmetic_mixture(config, other_config=OTHER_CONFIG).prepare, own, {**frozen, **teacher})
        for config, own, frozen in ((adapted, trained, base), (CONFIG, params, {}))
    )
    assert jax.tree.structure(found[0][1]) == jax.tree.structure(want[0][1])


def test_a_teachers_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        arithmetic_mixture(CONFIG, 0.0)
