"""AOT: alignment by optimal transport (arXiv:2406.05882): whole distributions of margins are compared, not pairs.

    paired:    m = log π(y_w)/π(y_l); L = (1/N) Σ_k f(β(m_(k) - m_ref,(k)))      both sorted over the batch
    unpaired:  L = (1/N) Σ_k f(β(Δ_w,(k) - Δ_l,(k)))                             f = smoothed -log σ

Sorting needs the whole optimizer batch: `prepare` finds which numbers have equal rank (one more forward pass), so that
the gradient does not depend on how the batch is cut.
"""

from collections.abc import Callable

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.types import Objective


def aot(policy: Callable, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """The policy's margins against the reference's."""

    def margins(pair):
        policy_margin = pair.chosen.logp - pair.rejected.logp
        return policy_margin, policy_margin - (pair.chosen.log_ratio - pair.rejected.log_ratio)

    def match(pair, present):
        return {"ref_margin": preferences.match_by_rank(*margins(pair), present)}

    def term(pair):
        return preferences.aot_loss(margins(pair)[0], pair.extra["ref_margin"], beta, label_smoothing)

    return preference_objective(policy, term, lambda answer: beta * answer.log_ratio, match=match)


def aot_unpaired(policy: Callable, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """Chosen answers against rejected ones."""

    def match(pair, present):
        chosen, rejected = pair.chosen.log_ratio, pair.rejected.log_ratio
        return {
            "rejected": preferences.match_by_rank(chosen, rejected, present),
            "chosen": preferences.match_by_rank(rejected, chosen, present),
        }

    def term(pair):
        matched = pair.extra["rejected"], pair.extra["chosen"]
        return preferences.aot_unpaired_loss(
            pair.chosen.log_ratio, pair.rejected.log_ratio, *matched, beta, label_smoothing
        )

    return preference_objective(policy, term, lambda answer: beta * answer.log_ratio, match=match)
