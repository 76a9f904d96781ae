"""XPO: online DPO with a bonus for leaving the reference's completions (arXiv:2405.21046, algorithm 1).

    L = (1/N) Σ_i [α log π(ỹ_i) - log σ(β(Δ_w - Δ_l))]        ỹ the completion that the reference sampled

xpo_pairs(traj, reference_traj) -> Pairs -> xpo(policy). Of each pair one completion is the policy's own, the other one
the reference's; minimizing log π(ỹ) moves probability to completions that the reference does not write.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_rewards
from rljax.algorithms.common.pairs import preference_objective
from rljax.algorithms.dpo import preference_term
from rljax.ops import preferences
from rljax.ops.preferences import PreferenceLoss
from rljax.types import Objective, Pairs, PolicyFn, Trajectory


def xpo(
    policy: PolicyFn, loss: PreferenceLoss = preferences.sigmoid, beta: float = 0.1, alpha: float = 1e-5
) -> Objective:
    """XPO over `Pairs` of `xpo_pairs`. `alpha`: α, the exploration bonus; 0 gives DPO. The default was TRL's (to 1.13).

    Raises ValueError for pairs whose `extra` does not say which completion is the reference's.
    """
    preference = preference_term(loss, beta)

    def term(pair):
        if "chosen_by_reference" not in pair.extra:
            raise ValueError("XPO needs Pairs.extra['chosen_by_reference'] [B]: make the pairs with xpo_pairs")
        by_reference = jnp.where(pair.extra["chosen_by_reference"], pair.chosen.logp, pair.rejected.logp)
        return preference(pair) + alpha * by_reference

    def reward(completion):
        return beta * completion.log_ratio

    return preference_objective(policy, term, reward)


def xpo_pairs(traj: Trajectory, reference_traj: Trajectory) -> Pairs:
    """The policy's completion of each prompt against the reference's: row i of both continues the same prompt.

    Of equal rewards the policy's own is chosen, as TRL did. A row without a valid reward on both sides gives a pair
    without tokens, which weighs nothing. Raises ValueError where the two trajectories differ in shape.
    """
    if traj.mask.shape != reference_traj.mask.shape:
        shapes = f"{traj.mask.shape} and {reference_traj.mask.shape}"
        raise ValueError(f"pairs are made of trajectories of one shape, not of {shapes}: pad the shorter one")
    rewards, valid = outcome_rewards(traj)
    reference_rewards, reference_valid = outcome_rewards(reference_traj)
    by_reference = reference_rewards > rewards
    comparable = (valid & reference_valid)[:, None]

    def select(use_reference):
        def choose(own, other):
            return jnp.where(jnp.expand_dims(use_reference, range(1, own.ndim)), other, own)

        side = jax.tree.map(choose, traj, reference_traj)
        return side.replace(mask=side.mask & comparable)

    chosen = select(by_reference)
    rejected = select(~by_reference)
    return Pairs(chosen=chosen, rejected=rejected, extra={"chosen_by_reference": by_reference})
