"""DPO: direct preference optimization (arXiv:2305.18290), and its family.

    L = (1/N) Σ_i loss(Δ_w, Δ_l, β)        Δ = Σ_t [log π(a_t | s_t) - log π_ref(a_t | s_t)] over a completion's tokens

`loss` is any function of `ops.preferences` or your own. The members of the family differ in the arguments:

    dpo(policy, partial(preferences.robust, label_smoothing=0.1))       labels that may be wrong
    dpo(policy, preferences.ipo, measure=mean_log_ratio)                IPO as its authors run it
    dpo(policy, beta=5.0, measure=mean_log_ratio)                       length-normalized (Tülu 3, arXiv:2411.15124)
    dpo(policy, measure=f_divergence(preferences.forward_kl))           f-DPO (arXiv:2309.16240)
    dpo(policy, nll=1.0)                                                RPO (arXiv:2404.19733)
    dpo(policy, pair_weight=wpo)                                        WPO (arXiv:2406.11827)
    dpo(policy, token_weights=ld_dpo_weights(0.3))                      LD-DPO (arXiv:2409.06411)
    dpo(policy, preferences.mixture((0.5, preferences.sigmoid), (0.5, preferences.bco_pair)))

RPO's NLL is that of each chosen completion over its own length, so that every pair weighs the same (eq. 1 of the paper;
`sequence_nll`). TRL's is the mean over the tokens of the batch (`chosen_nll`).

Terms that measure completions differently are mixed with `preference_objective` and `preference_term`. With `ref_logp`
of zeros it is reference-free. A completion cut by the length limit should not be a chosen one: filter before.
"""

from collections.abc import Callable

from rljax.algorithms.common.pairs import (
    CompletionFn,
    CompletionStats,
    PairStats,
    PairTermFn,
    TokenWeightsFn,
    preference_objective,
    uniform_token_weights,
)
from rljax.ops import preferences
from rljax.ops.preferences import PreferenceLoss
from rljax.ops.shapes import PerRow
from rljax.types import Objective, PolicyFn

PairWeightFn = Callable[[PairStats], PerRow | float]  # a constant factor of each pair's terms


def total_log_ratio(completion: CompletionStats) -> PerRow:
    """Δ, summed over the tokens."""
    return completion.log_ratio


def mean_log_ratio(completion: CompletionStats) -> PerRow:
    """Δ/n: length-normalized."""
    return completion.mean_log_ratio


def f_divergence(slope: Callable[[PerRow], PerRow], measure: CompletionFn = total_log_ratio) -> CompletionFn:
    """f'(π/π_ref) for one of the f' of `ops.preferences`."""

    def measured(completion):
        return slope(measure(completion))

    return measured


def ld_dpo_weights(alpha: float) -> TokenWeightsFn:
    """LD-DPO's token weights: α on the tokens beyond the length of the shorter completion of the pair."""

    def token_weights(mask, other):
        return preferences.shared_length_weights(mask, other, alpha)

    return token_weights


def uniform_pair_weight(pair: PairStats) -> float:
    """1 for every pair."""
    return 1.0


def wpo(pair: PairStats) -> PerRow:
    """How likely the policy is to write both completions. Raises ValueError if the policy returns no Σ_v π(v)²."""
    if pair.chosen.alignment is None:
        raise ValueError("WPO needs PolicyOutput.sum_pi_squared: a policy that returns it")
    return preferences.wpo_weight(pair.chosen.alignment, pair.rejected.alignment)


def preference_term(loss: PreferenceLoss, beta: float, measure: CompletionFn = total_log_ratio) -> PairTermFn:
    """loss(Δ_w, Δ_l, β) as a term of `preference_objective`."""

    def term(pair):
        return loss(measure(pair.chosen), measure(pair.rejected), beta)

    return term


def chosen_nll(pair: PairStats) -> PerRow:
    """-log π of the chosen completions: the token mean, as a term of `preference_objective`."""
    return pair.nll


def sequence_nll(pair: PairStats) -> PerRow:
    """-(1/n) log π of each chosen completion of n tokens, 0 of an empty one (RPO, arXiv:2404.19733, eq. 1).

    Token weights do not enter it.
    """
    return pair.nll / (pair.extra["nll_scale"] * pair.chosen.length)


def dpo(
    policy: PolicyFn,
    loss: PreferenceLoss = preferences.sigmoid,
    beta: float = 0.1,
    *,
    measure: CompletionFn = total_log_ratio,
    nll: float = 0.0,
    pair_weight: PairWeightFn = uniform_pair_weight,
    token_weights: TokenWeightsFn = uniform_token_weights,
) -> Objective:
    """An objective over `Pairs` whose trajectories carry `ref_logp`.

    Args:
      loss: (chosen [B], rejected [B], β) -> [B].
      measure: CompletionStats -> [B], what the loss compares. Times β it is the implicit reward of the metrics.
      nll: coefficient α of `sequence_nll` (RPO).
      pair_weight: PairStats -> [B], a constant factor of each pair's terms.
      token_weights: (mask [B T], mask of the other completion) -> [B T].
    """
    preference = preference_term(loss, beta, measure)

    def term(pair):
        return pair_weight(pair) * (preference(pair) + nll * sequence_nll(pair))

    def reward(completion):
        return beta * measure(completion)

    return preference_objective(policy, term, reward, token_weights)
