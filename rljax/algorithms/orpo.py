"""ORPO: odds ratio preference optimization (arXiv:2403.07691): imitation and preference in one stage, no reference.

    L = (1/N) Σ_i [-ℓ̄_w - λ log σ(log odds(y_w) - log odds(y_l))]        log odds = ℓ̄ - log(1 - e^ℓ̄)

ℓ̄ is the mean log-prob of a completion over its own length, in the odds and in the NLL (eq. 1, 2 and 6: an expectation
over pairs). TRL's NLL is the mean over the tokens of the batch, those of prompts too. Left out: the paper's code also
includes the prompt's tokens.
"""

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.types import Objective, PolicyFn


def orpo(policy: PolicyFn, lam: float = 0.1, nll: float = 1.0) -> Objective:
    """ORPO. `lam`: λ, the coefficient of the odds ratio; `nll`: that of the NLL."""

    def term(pair):
        return -nll * pair.chosen.mean_logp + lam * preferences.odds_ratio(
            pair.chosen.mean_logp, pair.rejected.mean_logp
        )

    def reward(completion):
        return lam * completion.mean_logp

    return preference_objective(policy, term, reward)
