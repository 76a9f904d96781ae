"""DPO: direct preference optimisation (arXiv:2305.18290), and its family.

    L = (1/N) Σ_i loss(Δ_w, Δ_l, β)        Δ = Σ_t [log π(a_t | s_t) - log π_ref(a_t | s_t)] over an answer's tokens

`loss` is any function of `ops.preferences` or your own. What the members of the family differ in is an argument:

    dpo(policy, partial(preferences.robust, label_smoothing=0.1))       labels that may be wrong
    dpo(policy, preferences.ipo, measure=mean_ratio)                    IPO as its authors run it
    dpo(policy, beta=5.0, measure=mean_ratio)                           length-normalised (Tülu 3, arXiv:2411.15124)
    dpo(policy, measure=f_divergence(preferences.forward_kl))              f-DPO (arXiv:2309.16240)
    dpo(policy, nll=1.0)                                                RPO (arXiv:2404.19733)
    dpo(policy, pair_weight=wpo)                                        WPO (arXiv:2406.11827)
    dpo(policy, token_weights=ld_dpo_weights(0.3))                        LD-DPO (arXiv:2409.06411)
    dpo(policy, preferences.mixture((0.5, preferences.sigmoid), (0.5, preferences.bco_pair)))

Terms that measure answers differently are mixed with `preference_objective` and `of_ratios`. With `ref_logp` of zeros
it is reference-free. An answer cut by its length should not be a chosen one: filter before.
"""

from collections.abc import Callable

from rljax.algorithms.common.pairs import CompletionStats, PairStats, preference_objective, uniform_token_weights
from rljax.ops import preferences
from rljax.types import Objective


def total_log_ratio(answer: CompletionStats):
    """Δ, summed over the tokens."""
    return answer.log_ratio


def mean_log_ratio(answer: CompletionStats):
    """Δ/n: length-normalised."""
    return answer.mean_log_ratio


def f_divergence(slope: Callable, measure: Callable = total_log_ratio) -> Callable:
    """f'(π/π_ref) for one of the f' of `ops.preferences`."""
    return lambda answer: slope(measure(answer))


def ld_dpo_weights(alpha: float) -> Callable:
    """LD-DPO's token weights: α on what exceeds the shorter answer of the pair."""
    return lambda mask, other: preferences.shared_length_weights(mask, other, alpha)


def uniform_pair_weight(pair: PairStats):
    """Every pair weighs 1."""
    return 1.0


def wpo(pair: PairStats):
    """How likely the policy is to write both answers. Raises ValueError where the policy gives no Σ_v π(v)²."""
    if pair.chosen.alignment is None:
        raise ValueError("WPO needs PolicyOutput.sum_pi_squared: a policy that returns it")
    return preferences.wpo_weight(pair.chosen.alignment, pair.rejected.alignment)


def preference_term(loss: Callable, beta: float, measure: Callable = total_log_ratio) -> Callable:
    """A loss of (Δ_w, Δ_l, β) as a term of `preference_objective`."""
    return lambda pair: loss(measure(pair.chosen), measure(pair.rejected), beta)


def chosen_nll(pair: PairStats):
    """-log π of the chosen answers: the token mean, as a term of `preference_objective`."""
    return pair.nll


def dpo(
    policy: Callable,
    loss: Callable = preferences.sigmoid,
    beta: float = 0.1,
    *,
    measure: Callable = total_log_ratio,
    nll: float = 0.0,
    pair_weight: Callable = uniform_pair_weight,
    token_weights: Callable = uniform_token_weights,
) -> Objective:
    """An objective over `Pairs` whose trajectories carry `ref_logp`.

    Args:
      policy: (params, frozen, trajectory) -> PolicyOutput.
      loss: (chosen [B], rejected [B], β) -> [B].
      measure: Answers -> [B], what of an answer the loss compares.
      nll: coefficient of the token mean of -log π over the chosen answers.
      pair_weight: Compared -> [B], a constant factor of each pair's terms.
      token_weights: (mask [B T], mask of the other answer) -> [B T].
    """
    compared = preference_term(loss, beta, measure)

    def term(pair):
        return pair_weight(pair) * (compared(pair) + nll * pair.nll)

    return preference_objective(policy, term, lambda answer: beta * answer.log_ratio, token_weights)
