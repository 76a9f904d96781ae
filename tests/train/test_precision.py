"""Gradients of half-precision parameters: float32, and so the same in any number of micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.train.objective import policy_objective
from rljax.train.update import accumulate_gradients, make_update
from tests.algorithms.tiny import ALGORITHMS, credited, rollout, state_of

DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)


def in_bfloat16(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@pytest.fixture(scope="module")
def gradients():
    """Of 256 rows in 1, 64 and 256 micro-batches, with bfloat16 parameters."""
    algorithm = ALGORITHMS["grpo"]
    parts = [credited(algorithm, rollout(seed, vocabulary=16)) for seed in range(16)]
    batch = jax.tree.map(lambda *x: jnp.concatenate(x) if jnp.ndim(x[0]) else x[0], *parts)
    objective = policy_objective(models.make_policy(DECODER), algorithm)
    params = in_bfloat16(models.init(DECODER, jax.random.key(0)))
    batch = objective.prepare(params, {}, batch, jax.random.key(0))
    of = jax.jit(lambda p, b, n: accumulate_gradients(objective, p, {}, b, n, None)[2], static_argnums=2)
    return {n: jax.device_get(of(params, batch, n)) for n in (1, 64, 256)}


@pytest.mark.parametrize("micro_batches", [64, 256])
def test_the_number_of_micro_batches_changes_the_gradient_by_less_than_1e_5(gradients, micro_batches):
    assert {x.dtype for x in jax.tree.leaves(gradients[micro_batches])} == {np.dtype("float32")}
    apart = optax.tree.norm(jax.tree.map(np.subtract, gradients[micro_batches], gradients[1]))
    assert apart < 1e-5 * optax.tree.norm(gradients[1])


def test_parameters_and_the_optimizers_state_keep_their_dtypes():
    algorithm, optimizer = ALGORITHMS["grpo"], optax.adamw(1e-2)
    update = make_update(policy_objective(models.make_policy(DECODER), algorithm), optimizer, 2)
    start = state_of(in_bfloat16(models.init(DECODER, jax.random.key(0))), optimizer)
    before = jax.tree.map(lambda x: x.dtype, (start.params, start.opt_state))
    state, metrics = update(start, credited(algorithm, rollout(vocabulary=16)))
    assert jax.tree.map(lambda x: x.dtype, (state.params, state.opt_state)) == before
    assert metrics["grad_norm"].dtype == jnp.float32
