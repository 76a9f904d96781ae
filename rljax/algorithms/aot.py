"""AOT: alignment by optimal transport (arXiv:2406.05882): distributions of margins are compared, not single pairs.

    paired:    m = log π(y_w)/π(y_l); L = (1/N) Σ_k f(β(m_(k) - m_ref,(k)))      both sorted over the batch
    unpaired:  L = (1/N) Σ_k f(β(Δ_w,(k) - Δ_l,(k)))                             f = smoothed -log σ

Sorting needs the whole optimizer batch: `prepare` finds which numbers have equal rank (one more forward pass), so that
the gradient does not depend on how the batch is split.
"""

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.types import Objective, PolicyFn


def aot(policy: PolicyFn, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """The policy's margins against the reference's."""

    def policy_margin(pair):
        return pair.chosen.logp - pair.rejected.logp

    def match(pair, present):
        ref_margin = policy_margin(pair) - (pair.chosen.log_ratio - pair.rejected.log_ratio)
        return {"ref_margin": preferences.match_by_rank(policy_margin(pair), ref_margin, present)}

    def term(pair):
        return preferences.aot_loss(policy_margin(pair), pair.extra["ref_margin"], beta, label_smoothing)

    def reward(completion):
        return beta * completion.log_ratio

    return preference_objective(policy, term, reward, match=match)


def aot_unpaired(policy: PolicyFn, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Chosen completions against rejected ones."""

    def match(pair, present):
        chosen = pair.chosen.log_ratio
        rejected = pair.rejected.log_ratio
        return {
            "rejected": preferences.match_by_rank(chosen, rejected, present),
            "chosen": preferences.match_by_rank(rejected, chosen, present),
        }

    def term(pair):
        return preferences.aot_unpaired_loss(
            pair.chosen.log_ratio,
            pair.rejected.log_ratio,
            matched_rejected=pair.extra["rejected"],
            matched_chosen=pair.extra["chosen"],
            beta=beta,
            label_smoothing=label_smoothing,
        )

    def reward(completion):
        return beta * completion.log_ratio

    return preference_objective(policy, term, reward, match=match)
