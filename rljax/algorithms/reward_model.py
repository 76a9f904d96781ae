"""Reward models: a score per answer, learnt from comparisons (InstructGPT, arXiv:2203.02155, eq. 1).

    pairs     (1/N) Σ -log σ(r_w - r_l - m) + η (r_w + r_l)²       Bradley-Terry; margin m, centring η (0.01)
    rankings  (1/P) Σ -log P(best first)                           Plackett-Luce, or all pairs of a prompt

`score`: (params, frozen, trajectory) -> [B], read where the model reads it (the last token, as a rule). The margin is
Llama 2's (arXiv:2307.09288), the centring that of arXiv:2312.09244; all pairs of a prompt: `ops.ranking.kwise`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algorithms.common.pairs import has_tokens, sum_and_count, uniform_row_weights, zero_masked
from rljax.ops import ranking
from rljax.types import Objective, Pairs, Trajectory


def reward_model(score: Callable, center_rewards_coefficient: float = 0.0) -> Objective:
    """An objective over `Pairs`, with their `margin` where there is one. `centring` is η."""

    def prepare(params, frozen, batch: Pairs, key) -> Pairs:
        chosen, rejected = zero_masked(batch.chosen), zero_masked(batch.rejected)
        present = has_tokens(chosen) | has_tokens(rejected)
        margin = None if batch.margin is None else jnp.where(present, batch.margin, 0.0)
        return batch.replace(chosen=chosen, rejected=rejected, margin=margin, weight=uniform_row_weights(present))

    def loss(params, frozen, batch: Pairs):
        present = has_tokens(batch.chosen) | has_tokens(batch.rejected)
        better = jnp.where(present, score(params, frozen, batch.chosen), 0.0)
        worse = jnp.where(present, score(params, frozen, batch.rejected), 0.0)
        margin = 0.0 if batch.margin is None else batch.margin
        terms = ranking.bradley_terry(
            better, worse, margin
        ) + center_rewards_coefficient * ranking.center_rewards_coefficient(better, worse)
        one = jnp.ones(())
        metrics = {
            "accuracy": sum_and_count(better > worse, present),
            "margin": sum_and_count(better - worse, present),
            "reward": sum_and_count((better + worse) / 2, present),
            "reward_max": (jnp.where(present, jnp.maximum(better, worse), -jnp.inf).max(), one),
            "reward_min": (jnp.where(present, jnp.minimum(better, worse), jnp.inf).min(), one),
        }
        return jnp.where(present, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)


class Rankings(NamedTuple):
    """P prompts with K answers each, best first; a place without tokens of its own is empty."""

    traj: Trajectory  # [P K T]
    weight: Float[Array, " P"]


def ranked_reward_model(score: Callable, loss: Callable = ranking.plackett_luce) -> Objective:
    """An objective over a `Trajectory` of [P K T], best answer first. `loss`: (scores [P K], valid [P K]) -> [P]."""

    def flat(traj):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), traj)

    def prepare(params, frozen, traj: Trajectory, key) -> Rankings:
        P, K, _ = traj.mask.shape
        rows = zero_masked(flat(traj))
        comparable = has_tokens(rows).reshape(P, K).sum(axis=1) >= 2
        traj = jax.tree.map(lambda x: x.reshape(P, K, *x.shape[1:]), rows)
        return Rankings(traj, uniform_row_weights(comparable))

    def total_loss(params, frozen, batch: Rankings):
        P, K, _ = batch.traj.mask.shape
        rows = flat(batch.traj)
        scores, valid = score(params, frozen, rows).reshape(P, K), has_tokens(rows).reshape(P, K)
        terms = loss(jnp.where(valid, scores, 0.0), valid)
        metrics = {"reward": sum_and_count(scores.reshape(-1), valid.reshape(-1))}
        return jnp.where(batch.weight > 0, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, total_loss)
