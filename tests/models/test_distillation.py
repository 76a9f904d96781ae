"""A student and a teacher of the decoder, compared in chunks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import decoder, policy
from rljax.models.distillation import make_compare
from rljax.models.lora import LoraConfig
from rljax.ops.distillation import full_vocabulary, top_k
from rljax.types import Distillation, TrainState, trajectory_of_tokens
from tests.ops.test_distillation import jsd, softmax

CONFIG = decoder.DecoderConfig(13, 12, 2, 2, 1, 6, 16)
TEACHER_CONFIG = decoder.DecoderConfig(13, 8, 1, 2, 1, 4, 12)
B, S = 3, 9


@pytest.fixture(scope="module")
def params():
    return policy.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def frozen():
    return {"teacher": policy.init(TEACHER_CONFIG, jax.random.key(5))}


def rows(tokens, prompt_length):
    chosen = np.broadcast_to(np.arange(tokens.shape[1]) >= prompt_length, tokens.shape)
    temperature = np.broadcast_to(np.array([1.0, 0.5, 2.0])[:, None], tokens.shape)
    return trajectory_of_tokens(
        jnp.asarray(tokens), jnp.ones(tokens.shape, int), jnp.asarray(chosen), jnp.zeros(tokens.shape),
        temperature=jnp.asarray(temperature, jnp.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 13, (B, S))


@pytest.fixture(scope="module")
def batch(tokens):
    return Distillation(rows(tokens, 3))


def logits(config, params, traj, temperature):
    hidden, _ = decoder.forward(config, params["decoder"], traj.inputs, traj.positions, traj.segments)
    return np.float64(decoder.logits(config, params["decoder"], hidden)) / np.asarray(temperature)[..., None]


def log_probs(z, traj):
    return np.take_along_axis(np.log(softmax(z)), np.asarray(traj.actions)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk_tokens", [7, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 4096))])
def test_both_are_compared_at_the_temperature_of_each_token(params, frozen, batch, chunk_tokens):
    traj = batch.traj
    student = logits(CONFIG, params, traj, traj.temperature)
    teacher = logits(TEACHER_CONFIG, frozen["teacher"], traj, traj.temperature)
    compare = make_compare(CONFIG, TEACHER_CONFIG, chunk_tokens)
    found = compare(params, frozen, batch, full_vocabulary(0.3))
    wanted = jsd(softmax(teacher), softmax(student), 0.3), log_probs(student, traj), log_probs(teacher, traj)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_teacher_who_reads_more_is_asked_about_the_same_tokens(params, frozen, tokens, batch):
    context = np.random.default_rng(1).integers(0, 13, (B, 4))
    told = rows(np.concatenate([context, tokens], axis=1), 4 + 3)
    teacher = logits(TEACHER_CONFIG, frozen["teacher"], told, told.temperature)[:, 4:]
    compare = make_compare(CONFIG, TEACHER_CONFIG, 7)
    mask = np.asarray(batch.traj.mask)
    found = compare(params, frozen, batch.replace(teacher_view=told), full_vocabulary(1.0))
    np.testing.assert_allclose(found.teacher_logp[mask], log_probs(teacher, batch.traj)[mask], rtol=1e-5, atol=1e-5)
    alone = compare(params, frozen, batch, full_vocabulary(1.0))
    assert np.abs(found.teacher_logp - alone.teacher_logp)[mask].max() > 1e-3
    np.testing.assert_array_equal(found.logp, alone.logp)


def test_beside_an_adapter_a_teacher_is_its_own_parameters_alone(params, frozen, batch):
    """The student's base has a layer more, which the teacher's config refuses by name."""
    config = dataclasses.replace(CONFIG, adapter=LoraConfig(rank=2))
    trained, base = policy.with_adapter(params, config, jax.random.key(1))
    compare = partial(make_compare(config, TEACHER_CONFIG), divergence=full_vocabulary(1.0))
    assert jax.eval_shape(compare, trained, {**base, **frozen}, batch).teacher_logp.shape == batch.traj.mask.shape


def test_parameters_of_another_decoder_are_told_by_name(params, batch):
    deeper = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(ValueError, match=r"another decoder's parameters: \['layers/2/attention/.* and \[\] too many"):
        decoder.hidden_of(deeper, params["decoder"], batch.traj)


def sizes(jaxpr):
    """Of every array in the program and in those that it calls."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


@pytest.mark.parametrize("divergence", [full_vocabulary(0.5), top_k(0.5, k=4)])
def test_no_array_holds_the_logits_of_all_tokens(params, frozen, batch, divergence):
    """In forward and backward pass: the largest one left is the embedding, of 12 x 211."""
    config = dataclasses.replace(CONFIG, vocab_size=211)
    own = policy.init(config, jax.random.key(0))
    everything = B * (S - 1) * config.vocab_size

    def largest(chunk_tokens):
        compare = make_compare(config, chunk_tokens=chunk_tokens)

        def loss(p):
            return compare(p, {"teacher": own}, batch, divergence).divergence.sum()

        return max(sizes(jax.make_jaxpr(jax.grad(loss))(own).jaxpr))

    assert largest(4096) >= everything
    assert largest(B) == CONFIG.hidden_size * config.vocab_size < everything


def test_without_a_teacher_the_error_says_where_to_put_it(params, batch):
    with pytest.raises(ValueError, match="frozen\\['teacher'\\]"):
        make_compare(CONFIG)(params, {}, batch, full_vocabulary(0.5))


def test_the_teacher_of_self_distillation_follows_the_student(params):
    teacher = policy.init(CONFIG, jax.random.key(3))
    state = TrainState(0, params, None, jax.random.key(0), frozen={"teacher": teacher, "reference": teacher})
    moved = policy.sync_reference(state, 0.25, "teacher").frozen
    want = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, teacher, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), moved["teacher"], want)
    jax.tree.map(np.testing.assert_array_equal, moved["reference"], teacher)
