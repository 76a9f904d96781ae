"""ORPO: odds ratio preference optimisation (arXiv:2403.07691): imitation and preference in one stage, no reference.

    L = NLL(chosen) - λ log σ(log odds(y_w) - log odds(y_l))        log odds = ℓ̄ - log(1 - e^ℓ̄), ℓ̄ the mean log-prob

The NLL is the token mean over the chosen answers. Left out: the paper's code takes it over the prompt's tokens too.
"""

from collections.abc import Callable

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.types import Objective


def orpo(policy: Callable, lam: float = 0.1, nll: float = 1.0) -> Objective:
    """ORPO with the odds ratio weighed by λ and the likelihood by `nll`."""

    def term(pair):
        return nll * pair.nll + lam * preferences.odds_ratio(pair.chosen.mean_logp, pair.rejected.mean_logp)

    return preference_objective(policy, term, lambda answer: lam * answer.mean_logp)
