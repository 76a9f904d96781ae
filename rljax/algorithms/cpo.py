"""Preferences without a reference: CPO, SimPO, AlphaPO.

    CPO      -log σ(β(log π_w - log π_l)) + c NLL(chosen)              sums          arXiv:2401.08417
    SimPO    -log σ(β(ℓ̄_w - ℓ̄_l) - γ)                                  token means   arXiv:2405.14734
    AlphaPO  SimPO with ℓ̄ -> (1 - e^{-αℓ̄})/α                           token means   arXiv:2501.03884

ℓ̄ is the mean of a completion's log-probs. The NLL is the mean over the tokens of all chosen completions, as in TRL's
CPO trainer; CPO's own equation has the sum over each completion, -log π_w.
"""

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.ops.preferences import PreferenceLoss
from rljax.types import Objective, PolicyFn


def cpo(policy: PolicyFn, loss: PreferenceLoss = preferences.sigmoid, beta: float = 0.1, nll: float = 1.0) -> Objective:
    """CPO. `loss`: (log π_w [B], log π_l [B], β) -> [B], one of `ops.preferences`; `nll` is the coefficient c."""

    def term(pair):
        return loss(pair.chosen.logp, pair.rejected.logp, beta) + nll * pair.nll

    def reward(completion):
        return beta * completion.logp

    return preference_objective(policy, term, reward)


def simpo(
    policy: PolicyFn,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    nll: float = 0.0,
    label_smoothing: float = 0.0,
) -> Objective:
    """SimPO; AlphaPO with `alpha` above 0; CPO-SimPO with `nll` above 0. γ is in units of reward."""

    def reward(completion):
        return beta * preferences.alphapo_reward(completion.mean_logp, alpha)

    def term(pair):
        preference = preferences.simpo_loss(reward(pair.chosen), reward(pair.rejected), 1.0, gamma, label_smoothing)
        return preference + nll * pair.nll

    return preference_objective(policy, term, reward)
