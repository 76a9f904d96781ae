"""Deep Q-learning (Mnih et al. 2015; arXiv:1312.5602).

    L = mean of ½ (r + d max_a' Q_target(s', a') - Q(s, a))²        d = γ^n, 0 where the episode terminated

`double`: the action a' is the trained network's choice (van Hasselt et al. 2016, arXiv:1509.06461). `huber`: the square
becomes linear beyond that error. The target network is `frozen["target"]`; the loop updates it. A batch is a
`Transition`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.ops import q_learning
from rljax.types import Objective, Params, all_at_once

ActionValueFn = Callable[[Params, Array], Float[Array, "*N A"]]  # (params, observations [N ...]) -> Q


def dqn(q: ActionValueFn, double: bool = False, huber: float | None = None) -> Objective:
    """Deep Q-learning. `q`: (params, observations [N ...]) -> [N A]."""

    def prepare(params, frozen, batch, key, map_rows=all_at_once):
        share = jnp.ones(batch.reward.shape) if batch.weight is None else batch.weight
        return batch.replace(weight=share / jnp.maximum(share.sum(), 1.0))

    def loss(params, frozen, batch):
        values = q(params, batch.observation)
        next_values = q(frozen["target"], batch.next_observation)
        inputs = (values, batch.action, batch.reward, batch.discount, next_values)
        if double:
            error = q_learning.double_q_learning(*inputs, q(params, batch.next_observation))
        else:
            error = q_learning.q_learning(*inputs)
        terms = 0.5 * error**2 if huber is None else q_learning.huber(error, huber)
        count = jnp.float32(error.size)
        metrics = {"td_error": (jnp.abs(error).sum(), count), "q": (values.mean(axis=1).sum(), count)}
        return (batch.weight * terms).sum(), metrics

    return Objective(prepare, loss)
