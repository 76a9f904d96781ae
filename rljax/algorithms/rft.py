"""RFT: rejection sampling fine-tuning (arXiv:2308.01825).

    L = -(1/Σm) Σ_{i: R_i > above} Σ_t log π(a_it | s_it)        m: the decisions of the accepted completions

Every correct completion is a demonstration; the others leave the mask. A prompt without a correct completion adds
nothing. The paper keeps one of several completions with the same chain of equations: left out.
"""

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards
from rljax.algorithms.reinforce import reinforce
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, WeightsFn


def rft(above: float = 0.0, weights: WeightsFn = token_mean) -> Algorithm:
    """Supervised fine-tuning on completions whose reward is above `above`."""

    def credit(traj, coefficients):
        rewards, valid = outcome_rewards(traj)
        kept = valid & (rewards > above)
        return outcome_batch(traj, kept.astype(rewards.dtype), kept, coefficients)

    return reinforce()._replace(credit=credit, group_signal=None, weights=weights)
