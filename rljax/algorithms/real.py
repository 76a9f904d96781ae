"""REAL: rewards as labels, a classification loss over a group (arXiv:2602.05630; definition of ms-swift).

    S_i = (1/(n_i τ)) Σ_t log ρ_it
    L = (1/P) Σ_groups [log(1 + Σ_{Â<=0} e^{S_j}) + log(1 + Σ_{Â>0} e^{-S_j})]

over the groups that have both kinds of completions; P counts all groups. A group's loss couples its rows, which
micro-batches may separate: `prepare` computes the slopes ∂L/∂S_i over the whole batch, so that the loss of a row is
slope · S_i, with L's own value and gradient. Â is GRPO's; only its sign is read, so that no weight on it corrects for
another sampler.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, require, rewards_differ
from rljax.ops import groups
from rljax.ops.ratios import sequence_geometric_mean
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm


def real(temperature: float = 0.5) -> Algorithm:
    """REAL, on unpacked rows and in one minibatch per rollout: `prepare` needs whole groups."""

    def score(output, batch):
        return sequence_geometric_mean(output.logp - old_policy_logp(batch.traj), batch.mask) / temperature

    def prepare(output, batch, key):
        require(batch.traj, "group")
        group = batch.traj.group
        if group.ndim > 1:
            raise ValueError("REAL compares the rows of a group: Trajectory.group must be [B], not [B T] (packed rows)")
        rows = batch.mask.any(axis=1)
        row_score = jnp.clip(score(output, batch)[:, 0], -20.0, 20.0)
        positive = rows & ((batch.mask * batch.advantages).sum(axis=1) > 0)
        negative = rows & ~positive
        both = (groups.group_count(group, positive) > 0) & (groups.group_count(group, negative) > 0)

        slope = jnp.zeros_like(row_score)
        value = jnp.zeros_like(row_score)
        for kind, sign in ((negative, 1.0), (positive, -1.0)):
            mass = jnp.where(kind & both, jnp.exp(sign * row_score), 0.0)
            total = 1.0 + groups.group_sum(mass, group)
            slope += sign * mass / total
            value += jnp.where(rows & both, jnp.log(total), 0.0)

        share = jnp.where(rows, 1.0 / jnp.maximum(groups.group_count(group, rows), 1.0), 0.0)
        scale = rows.sum() / jnp.maximum(share.sum(), 1.0)  # the weights divide by rows, the equation by groups
        extra = {"slope": scale * slope, "value": scale * value * share}
        spread = {name: jnp.broadcast_to(x[:, None], batch.mask.shape) for name, x in extra.items()}
        return batch.replace(extra={**batch.extra, **spread})

    def loss(output, batch):
        row_score = score(output, batch)
        return batch.extra["slope"] * (row_score - stop_gradient(row_score)) + batch.extra["value"], {}

    return Algorithm(
        credit=group_relative(),
        loss=loss,
        weights=seq_mean_token_mean,
        prepare=prepare,
        group_signal=rewards_differ,
        least_group=2,
        whole_groups=True,
        off_policy="never",
    )
