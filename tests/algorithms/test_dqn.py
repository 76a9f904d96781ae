"""The loss of deep Q-learning against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms import dqn
from rljax.types import Transition

# Observations choose a row of the table. Q: of the network; TARGET: of the target network.
Q, TARGET = jnp.array([[1.0, 2.0], [4.0, 3.0]]), jnp.array([[0.0, 0.0], [5.0, 6.0]])
BATCH = Transition(
    jnp.array([0, 0]), jnp.array([1, 0]), jnp.array([1.0, 5.0]), jnp.array([1, 1]), jnp.array([0.9, 0.0])
)


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ({}, [1 + 0.9 * 6 - 2, 5 - 1]),
        ({"double": True}, [1 + 0.9 * 5 - 2, 5 - 1]),  # the network likes action 0, worth 5 to the target
        ({"huber": 1.0}, [1 + 0.9 * 6 - 2, 5 - 1]),
    ],
    ids=["plain", "double", "huber"],
)
def test_loss_and_gradient_by_hand(arguments, errors):
    objective = dqn(lambda table, observations: table[observations], **arguments)
    batch = objective.prepare(Q, {"target": TARGET}, BATCH, None)
    (loss, metrics), slope = jax.value_and_grad(objective.loss, has_aux=True)(Q, {"target": TARGET}, batch)
    errors = np.array(errors)
    terms = np.abs(errors) - 0.5 if "huber" in arguments else 0.5 * errors**2
    np.testing.assert_allclose(loss, terms.mean(), rtol=1e-6)
    pull = np.clip(errors, -1, 1) if "huber" in arguments else errors
    np.testing.assert_allclose(slope, [[-pull[1] / 2, -pull[0] / 2], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["td_error"][0] / metrics["td_error"][1], np.abs(errors).mean(), rtol=1e-6)


def test_what_is_no_transition_weighs_nothing():
    objective = dqn(lambda table, observations: table[observations])
    batch = objective.prepare(Q, {"target": TARGET}, BATCH.replace(weight=jnp.array([0.0, 1.0])), None)
    loss, _ = objective.loss(Q, {"target": TARGET}, batch)
    np.testing.assert_allclose(loss, 0.5 * (5 - 1) ** 2, rtol=1e-6)
