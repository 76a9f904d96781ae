"""Losses of one decision. The peers' numbers are in tests/test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import losses
from rljax.ops.ratios import importance_ratio


@pytest.mark.parametrize("advantage", [-1.3, 0.4])
def test_on_policy_the_surrogate_has_the_gradient_of_the_policy_gradient(advantage):
    logp, adv = jnp.float32([-0.3, -5.0]), jnp.full(2, advantage)
    surrogate = jax.grad(lambda x: losses.clipped_surrogate(importance_ratio(x, logp), adv).sum())(logp)
    plain = jax.grad(lambda x: losses.policy_gradient(x, adv).sum())(logp)
    np.testing.assert_allclose(surrogate, plain, rtol=1e-6)
    np.testing.assert_allclose(surrogate, [-advantage] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(2.9, -1.0, 1.0), (3.1, -1.0, 0.0), (1.25, 1.0, -1.0), (1.3, 1.0, 0.0), (0.7, -1.0, 0.0), (0.7, 1.0, -1.0)],
)
def test_where_the_clips_pass_a_gradient(ratio, advantage, gradient):
    def loss(rho):
        return losses.dual_clip(
            losses.clipped_surrogate(rho, jnp.float32(advantage), 0.2, 0.28), jnp.float32(advantage)
        )

    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(ratio)), gradient)


def test_clipped_fraction_is_where_the_surrogate_has_no_gradient():
    ratio, advantages = jnp.meshgrid(jnp.linspace(0.5, 1.6, 23), jnp.float32([-1.0, 0.5]))
    slope = jax.grad(lambda rho: losses.clipped_surrogate(rho, advantages, 0.2, 0.3).sum())(ratio)
    np.testing.assert_array_equal(losses.clipped_fraction(ratio, advantages, 0.2, 0.3), slope == 0)


def test_clip_metrics_tell_which_bound_was_left():
    """Ratios below, inside and above [0.8, 1.3], for a bad, a neutral and a good decision."""
    ratio, advantages = jnp.float32([[0.7, 1.0, 1.4]] * 3), jnp.float32([[-1.0] * 3, [0.0] * 3, [0.5] * 3])
    shown = losses.clip_metrics(ratio, advantages, 0.2, 0.3)
    assert shown["clip_fraction_low"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert shown["clip_fraction_high"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert shown["clip_fraction"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_advantages_returns_and_old_quantities_are_constants():
    x = jnp.float32([0.1, -0.4])
    for loss in (
        lambda c: losses.clipped_surrogate(x, c),
        lambda c: losses.dual_clip(x, c),
        lambda c: losses.policy_gradient(x, c),
        lambda c: losses.value_loss(x, c),
        lambda c: losses.clipped_value_loss(x, c, x + 1),
        lambda c: losses.clipped_value_loss(x, x + 1, c),
    ):
        np.testing.assert_array_equal(jax.grad(lambda c, loss=loss: loss(c).sum())(x + 0.05), 0.0)


@pytest.mark.parametrize(
    ("value", "old", "target", "want", "slope"),
    [
        (
            1.0,
            0.0,
            2.0,
            0.5 * 1.8**2,
            0.0,
        ),  # moved by more than 0.2 towards the target: the clipped error is the larger
        (1.0, 0.0, 0.0, 0.5, 1.0),  # away from it: its own error is
        (0.1, 0.0, 2.0, 0.5 * 1.9**2, -1.9),  # within the range both are the same
        (-1.0, 0.0, 0.5, 0.5 * 1.5**2, -1.5),
    ],
)
def test_of_a_value_and_its_clipped_one_the_worse_counts(value, old, target, want, slope):
    old, target = jnp.float32(old), jnp.float32(target)
    got = jax.value_and_grad(lambda v: losses.clipped_value_loss(v, old, target, 0.2))(jnp.float32(value))
    np.testing.assert_allclose(got, (want, slope), rtol=1e-6)
    plain = jax.value_and_grad(lambda v: losses.value_loss(v, target))(jnp.float32(value))
    np.testing.assert_allclose(plain, (0.5 * (value - target) ** 2, value - target), rtol=1e-6)
