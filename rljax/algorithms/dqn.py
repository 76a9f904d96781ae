"""Deep Q-learning (Mnih et al. 2015; arXiv:1312.5602).

    L = mean of ½ (r + d max_a' Q_target(s', a') - Q(s, a))²        d = γ^n, 0 where the episode terminated

`double`: the action a' is the trained network's choice (van Hasselt et al. 2016, arXiv:1509.06461). `huber`: the square
becomes linear beyond that error. The target network is `frozen["target"]`; copying it, or letting it follow, is the
loop's (`train.compiled.follow`). A batch is a `Transition`.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.ops import q_learning
from rljax.types import Objective


def dqn(q: Callable, double: bool = False, huber: float | None = None) -> Objective:
    """Deep Q-learning. `q`: (params, observations [N ...]) -> [N A]."""

    def prepare(params, frozen, batch, key):
        return batch.replace(weight=jnp.full(batch.reward.shape, 1.0 / batch.reward.size))

    def loss(params, frozen, batch):
        values, following = q(params, batch.observation), q(frozen["target"], batch.next_observation)
        facts = (values, batch.action, batch.reward, batch.discount, following)
        if double:
            error = q_learning.double_q_learning(*facts, q(params, batch.next_observation))
        else:
            error = q_learning.q_learning(*facts)
        terms = 0.5 * error**2 if huber is None else q_learning.huber(error, huber)
        count = jnp.float32(error.size)
        metrics = {"td_error": (jnp.abs(error).sum(), count), "q": (values.mean(axis=1).sum(), count)}
        return (batch.weight * terms).sum(), metrics

    return Objective(prepare, loss)
