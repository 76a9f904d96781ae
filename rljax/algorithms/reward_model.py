"""Reward models: a score per completion, learned from comparisons (InstructGPT, arXiv:2203.02155, eq. 1).

    pairs     (1/N) Σ -log σ(r_w - r_l - m) + η (r_w + r_l)²       Bradley-Terry; margin m, centering η (0.01)
    rankings  (1/P) Σ -log P(best first)                           Plackett-Luce, or all pairs of a prompt

`score`: (params, frozen, trajectory) -> [B], usually read at the last token: a pair one of whose completions has no
token is no comparison, and weighs nothing. The margin is Llama 2's (arXiv:2307.09288), 0 of a pair that has none (NaN);
the centering is that of arXiv:2312.09244; all pairs of a prompt: `ops.ranking.kwise`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algorithms.common.pairs import (
    checked_zero_masked,
    evaluate_both,
    has_tokens,
    sum_and_count,
    uniform_row_weights,
)
from rljax.ops import ranking
from rljax.ops.ranking import RankedMask, RankedScores
from rljax.types import Objective, Pairs, ScoreFn, Trajectory, all_at_once

RankingLossFn = Callable[[RankedScores, RankedMask], Float[Array, "*P"]]  # (scores, valid) -> loss of each prompt


def reward_model(score: ScoreFn, center_rewards_coefficient: float = 0.0) -> Objective:
    """An objective over `Pairs`, with their `margin` if there is one. `center_rewards_coefficient` is η."""

    def prepare(params, frozen, batch: Pairs, key, map_rows=all_at_once) -> Pairs:
        chosen = checked_zero_masked(batch.chosen)
        rejected = checked_zero_masked(batch.rejected)
        present = has_tokens(chosen) & has_tokens(rejected)
        margin = batch.margin
        if margin is not None:
            margin = jnp.where(present & ~jnp.isnan(margin), margin, 0.0)
        return batch.replace(chosen=chosen, rejected=rejected, margin=margin, weight=uniform_row_weights(present))

    def loss(params, frozen, batch: Pairs):
        present = has_tokens(batch.chosen) & has_tokens(batch.rejected)
        chosen, rejected = evaluate_both(score, params, frozen, batch.chosen, batch.rejected)
        chosen = jnp.where(present, chosen, 0.0)
        rejected = jnp.where(present, rejected, 0.0)
        margin = 0.0 if batch.margin is None else batch.margin
        penalty = ranking.center_rewards_penalty(chosen, rejected)
        terms = ranking.bradley_terry(chosen, rejected, margin) + center_rewards_coefficient * penalty
        highest = jnp.where(present, jnp.maximum(chosen, rejected), -jnp.inf).max()
        lowest = jnp.where(present, jnp.minimum(chosen, rejected), jnp.inf).min()
        metrics = {
            "accuracy": sum_and_count(chosen > rejected, present),
            "margin": sum_and_count(chosen - rejected, present),
            "reward": sum_and_count((chosen + rejected) / 2, present),
            "reward_max": (highest, jnp.ones(())),
            "reward_min": (lowest, jnp.ones(())),
        }
        return jnp.where(present, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, loss)


class Rankings(NamedTuple):
    """P prompts with K completions each, best first; an entry without tokens of its own is empty."""

    traj: Trajectory  # [P K T]
    weight: Float[Array, " P"]


def ranked_reward_model(score: ScoreFn, loss: RankingLossFn = ranking.plackett_luce) -> Objective:
    """An objective over a `Trajectory` [P K T], best completion first. `loss`: (scores [P K], valid [P K]) -> [P]."""

    def flatten(traj):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), traj)

    def prepare(params, frozen, traj: Trajectory, key, map_rows=all_at_once) -> Rankings:
        P, K, _ = traj.mask.shape
        rows = checked_zero_masked(flatten(traj))
        comparable = has_tokens(rows).reshape(P, K).sum(axis=1) >= 2
        traj = jax.tree.map(lambda x: x.reshape(P, K, *x.shape[1:]), rows)
        return Rankings(traj, uniform_row_weights(comparable))

    def total_loss(params, frozen, batch: Rankings):
        P, K, _ = batch.traj.mask.shape
        rows = flatten(batch.traj)
        scores = score(params, frozen, rows).reshape(P, K)
        valid = has_tokens(rows).reshape(P, K)
        terms = loss(jnp.where(valid, scores, 0.0), valid)
        right, pairs = ranking.pairs_in_order(scores, valid)
        metrics = {
            "reward": sum_and_count(scores.reshape(-1), valid.reshape(-1)),
            "accuracy": (right.sum().astype(float), pairs.sum().astype(float)),
        }
        return jnp.where(batch.weight > 0, batch.weight * terms, 0.0).sum(), metrics

    return Objective(prepare, total_loss)
