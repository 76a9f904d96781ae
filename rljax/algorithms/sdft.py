"""SDFT: the model, shown a demonstration, teaches itself without one (arXiv:2601.19897).

    L = (1/N⁺) Σ_i (1/n_i) Σ_t KL(q(· | x, y_<t) ‖ p(· | x, c, y_<t))        y ~ q, c the demonstration

q is the student, p the same model with c in its prompt (`Distillation.teacher_view`), with the parameters
frozen["teacher"]: the starting ones, or a moving average (`models.policy.sync_reference(state, rate, "teacher")`).
β = 0 gives the forward KL instead.
"""

from rljax.algorithms.gkd import gkd
from rljax.ops.distillation import EstimatorFn, full_vocabulary
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import CompareFn, Objective, WeightsFn, all_at_once


def sdft(
    compare: CompareFn,
    beta: float = 1.0,
    estimator: EstimatorFn = full_vocabulary,
    weights: WeightsFn = seq_mean_token_mean,
) -> Objective:
    """SDFT, which is GKD over `Distillation` with `teacher_view`. Raises ValueError for a batch without one."""
    return with_required_view(gkd(compare, beta, estimator, weights))


def with_required_view(objective: Objective) -> Objective:
    """The objective for batches with a `teacher_view`: without one a teacher of equal parameters teaches nothing."""

    def prepare(params, frozen, batch, key, map_rows=all_at_once):
        if batch.teacher_view is None:
            raise ValueError("self-distillation needs Distillation.teacher_view: what the teacher reads besides")
        return objective.prepare(params, frozen, batch, key, map_rows)

    return objective._replace(prepare=prepare)
