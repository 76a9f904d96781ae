"""The policy that the trainer sees, and the facts that annotate adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.special import log_softmax

from rljax.models import decoder, policy
from rljax.ops.trust_region import hessian_vector_product
from rljax.types import TrainState, trajectory_of_tokens

CONFIG = decoder.DecoderConfig(13, 12, 2, 2, 1, 6, 16)
B, S = 3, 9


@pytest.fixture(scope="module")
def params():
    made = policy.with_value_head(policy.init(CONFIG, jax.random.key(0)), CONFIG)
    return made | {"value_head": jax.random.normal(jax.random.key(1), (CONFIG.hidden_size,))}


@pytest.fixture(scope="module")
def traj():
    tokens = np.random.default_rng(0).integers(0, 13, (B, S))
    segments = np.array([[1] * 9, [0] * 2 + [1] * 7, [1] * 4 + [2] * 5])
    chosen = (segments > 0) & (np.arange(S) >= 3)
    temperature = np.broadcast_to(np.array([1.0, 0.5, 2.0])[:, None], (B, S))
    return trajectory_of_tokens(
        tokens, segments, jnp.asarray(chosen), np.zeros((B, S)), temperature=jnp.asarray(temperature)
    )


def expected(params, traj):
    """Log-probs, entropies and values in float64, from the decoder's hidden states."""
    hidden, _ = decoder.forward(CONFIG, params["decoder"], traj.inputs, traj.positions, traj.segments)
    hidden = np.float64(hidden)
    logits = hidden @ np.float64(params["decoder"]["embedding"]).T / np.asarray(traj.temperature)[..., None]
    shares = log_softmax(logits, axis=-1)
    logp = np.take_along_axis(shares, np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    return logp, -(np.exp(shares) * shares).sum(-1), hidden @ np.float64(params["value_head"])


@pytest.mark.parametrize("chunk_tokens", [1, 7, 4096])
def test_policy_speaks_at_the_temperature_of_each_token(params, traj, chunk_tokens):
    out = policy.make_policy(CONFIG, chunk_tokens)(params, {}, traj)
    for got, want in zip((out.logp, out.entropy, out.values), expected(params, traj), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_no_temperature_is_temperature_one(params, traj):
    model = policy.make_policy(CONFIG)
    ones = traj.replace(temperature=jnp.ones_like(traj.temperature))
    np.testing.assert_array_equal(model(params, {}, traj.replace(temperature=None)).logp, model(params, {}, ones).logp)


def test_value_head_starts_at_zero_and_is_optional(traj):
    without = policy.init(CONFIG, jax.random.key(0))
    with_head = policy.with_value_head(without, CONFIG)
    model = policy.make_policy(CONFIG)
    np.testing.assert_array_equal(model(with_head, {}, traj).values, np.zeros((B, S - 1)))
    assert model(without, {}, traj).values is None
    for params in (with_head, without):
        axes = policy.logical_axes(CONFIG, params)
        jax.tree.map(lambda x, names: len(names) == x.ndim or pytest.fail(f"{x.shape}: {names}"), params, axes)


def test_annotate_fills_what_is_needed(params, traj):
    model = policy.make_policy(CONFIG)
    reference = policy.init(CONFIG, jax.random.key(7))
    teacher = policy.init(CONFIG, jax.random.key(8))
    state = TrainState(0, params, None, jax.random.key(0), frozen={"reference": reference, "teacher": teacher})
    needs = ("ref_logp", "values", "old_logp", "teacher_logp", "sum_pi_squared", "entropy")
    filled = policy.make_annotate(model, needs)(state, traj)
    logp, entropy, values = expected(params, traj)
    mask = np.asarray(traj.mask)
    np.testing.assert_allclose(filled.old_logp, logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled.entropy, entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled.ref_logp, model(reference, {}, traj).logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled.teacher_logp, model(teacher, {}, traj).logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled.sum_pi_squared, model(params, {}, traj).sum_pi_squared, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled.values, np.pad(np.where(mask, values, 0), ((0, 0), (0, 1))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(), ("values",), ("old_logp",)])
def test_annotate_fills_no_more(params, traj, needs):
    state = TrainState(0, params, None, jax.random.key(0))
    filled = policy.make_annotate(policy.make_policy(CONFIG), needs)(state, traj)
    names = ("ref_logp", "values", "old_logp")
    assert {name for name in names if getattr(filled, name) is not None} == set(needs)
    assert traj.values is None


def test_annotate_refuses_what_it_does_not_know():
    with pytest.raises(
        ValueError,
        match=r"cannot fill \['routing'\]; it can fill \['entropy', 'old_logp', 'ref_logp', 'sum_pi_squared'",
    ):
        policy.make_annotate(policy.make_policy(CONFIG), ("values", "routing"))


def test_a_reference_follows_the_policy_as_far_as_it_is_told():
    """Copied, averaged; what the reference does not hold (a value head) is left out; an adapter's is an adapter."""
    start = policy.init(CONFIG, jax.random.key(0))
    now = policy.with_value_head(jax.tree.map(lambda x: x + 1, start), CONFIG)
    state = TrainState(0, now, None, jax.random.key(0), frozen={"reference": start, "other": 1})
    for share in (1.0, 0.25):
        found = policy.sync_reference(state, share).frozen
        assert found["other"] == 1
        want = {"decoder": jax.tree.map(lambda x, s=share: x + s, start["decoder"])}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found["reference"], want)


@pytest.mark.parametrize(
    ("vocabulary", "backend", "tokens"), [(4096, "cpu", 1024), (151936, "gpu", 2**27 * 8 // 151936), (2**23, "cpu", 1)]
)
def test_a_chunk_is_counted_in_logits(vocabulary, backend, tokens):
    assert policy.default_chunk_tokens(vocabulary, backend) == tokens


@pytest.mark.parametrize("chunk_tokens", [7, 4096])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_the_divergence_of_two_policies_is_exact_at_the_temperature(params, traj, direction, chunk_tokens):
    other = policy.init(CONFIG, jax.random.key(5))
    divergence = policy.make_divergence(CONFIG, chunk_tokens, direction)

    def shares(params):
        hidden, _ = decoder.forward(CONFIG, params["decoder"], traj.inputs, traj.positions, traj.segments)
        logits = np.float64(hidden) @ np.float64(params["decoder"]["embedding"]).T
        return log_softmax(logits / np.asarray(traj.temperature)[..., None], axis=-1)

    p, q = (shares(params), shares(other)) if direction == "old_new" else (shares(other), shares(params))
    got = jax.jit(divergence)(other, params, {}, traj)
    np.testing.assert_allclose(got, (np.exp(p) * (p - q)).sum(axis=-1), rtol=1e-4, atol=1e-5)


def test_products_with_the_fisher_matrix_go_through_the_decoder(params, traj):
    """To second order KL(θ ‖ θ + εv) = ½ ε² vᵀFv, which is E (∂ log π / ∂ε)² under the policy itself."""
    divergence = policy.make_divergence(CONFIG, 7)
    flat, unflatten = ravel_pytree({"decoder": params["decoder"]})
    v = jax.random.normal(jax.random.key(3), flat.shape) / flat.size**0.5
    old = unflatten(flat)
    kl = lambda x: divergence(unflatten(x), old, {}, traj).mean()  # noqa: E731
    got = v @ jax.jit(lambda x, v: hessian_vector_product(kl, x)(v))(flat, v)

    def log_shares(x):
        hidden, _ = decoder.forward(CONFIG, unflatten(x)["decoder"], traj.inputs, traj.positions, traj.segments)
        logits = decoder.logits(CONFIG, unflatten(x)["decoder"], hidden)
        return jax.nn.log_softmax(logits / traj.temperature[..., None])

    logp, slope = jax.jit(lambda x, v: jax.jvp(log_shares, (x,), (v,)))(flat, v)
    np.testing.assert_allclose(got, (jnp.exp(logp) * slope**2).sum(axis=-1).mean(), rtol=1e-3)
