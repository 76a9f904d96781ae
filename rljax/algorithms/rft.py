"""RFT: rejection sampling fine-tuning (arXiv:2308.01825).

    L = -(1/Σm) Σ_{i correct} Σ_t log π(a_it | s_it)        m: the decisions of the accepted completions

Every correct completion, whose first score is above `above` (`correct_rows`), is a demonstration; the others leave the
mask. A prompt without a correct completion adds nothing. The paper keeps one of several completions with the same chain
of equations: left out.
"""

from rljax.algorithms.common.credit import correct_rows, outcome_batch
from rljax.algorithms.reinforce import no_baseline, reinforce
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, WeightsFn


def rft(above: float = 0.0, weights: WeightsFn = token_mean) -> Algorithm:
    """Supervised fine-tuning on correct completions."""

    def credit(traj, coefficients):
        kept, _ = correct_rows(traj, above)
        return outcome_batch(traj, kept.astype(traj.rewards.dtype), kept, coefficients)

    return reinforce(no_baseline)._replace(credit=credit, reads="correct", weights=weights)
