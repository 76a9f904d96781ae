"""TPO: triple preference optimization, of a gold, a chosen and a rejected completion (arXiv:2405.16681).

    tpo      -log σ(β(log π_w - log π_l)) + α NLL(gold)        sums
    tpo_l    -log σ(β(ℓ̄_w - ℓ̄_l) - γ) + α NLL(gold)            token means

ℓ̄ is the mean of a completion's log-probs. The NLL is the token mean over the gold completions, `Pairs.gold`. No
reference, and no stage of supervised fine-tuning before it.
"""

import jax.numpy as jnp

from rljax.algorithms.common.pairs import checked_zero_masked, preference_objective
from rljax.ops import preferences
from rljax.types import Objective, Pairs, PolicyFn, all_at_once


def tpo(policy: PolicyFn, beta: float = 0.01, alpha: float = 1.0) -> Objective:
    """TPO over `Pairs` with `gold`. `alpha`: α, the coefficient of the NLL."""

    def term(pair):
        return preferences.sigmoid(pair.chosen.logp, pair.rejected.logp, beta)

    def reward(completion):
        return beta * completion.logp

    return with_gold_nll(policy, preference_objective(policy, term, reward), alpha)


def tpo_l(policy: PolicyFn, beta: float = 2.0, alpha: float = 0.05, gamma: float = 1.6) -> Objective:
    """TPO-L: of token means, with the target margin γ in units of reward."""

    def term(pair):
        return preferences.simpo_loss(pair.chosen.mean_logp, pair.rejected.mean_logp, beta, gamma)

    def reward(completion):
        return beta * completion.mean_logp

    return with_gold_nll(policy, preference_objective(policy, term, reward), alpha)


def with_gold_nll(policy: PolicyFn, objective: Objective, alpha: float) -> Objective:
    """The objective plus α times the token mean of -log π over the gold completions of the whole optimizer batch.

    Raises ValueError for pairs without `gold`.
    """

    def prepare(params, frozen, batch: Pairs, key, map_rows=all_at_once) -> Pairs:
        if batch.gold is None:
            raise ValueError("TPO needs Pairs.gold: a third completion of each prompt, to be imitated")
        gold = checked_zero_masked(batch.gold)
        batch = objective.prepare(params, frozen, batch.replace(gold=gold), key, map_rows)
        share = 1.0 / jnp.maximum(gold.mask.sum(), 1).astype(float)
        share_of_row = jnp.broadcast_to(share, gold.mask.shape[:1])
        return batch.replace(extra=batch.extra | {"gold_token_weight": share_of_row})

    def loss(params, frozen, batch: Pairs):
        value, metrics = objective.loss(params, frozen, batch)
        gold = batch.gold
        nll = -jnp.where(gold.mask, policy(params, frozen, gold).logp, 0.0)
        weighted = (batch.extra["gold_token_weight"][:, None] * nll).sum()
        return value + alpha * weighted, metrics | {"nll/gold": (nll.sum(), gold.mask.sum().astype(float))}

    return objective._replace(prepare=prepare, loss=loss)
