"""Building blocks of distillation: what a student and a teacher say of the same tokens, as an Objective.

`compare` (`models.distillation.make_compare`) runs both models and computes a divergence in chunks of tokens: no array
of [B T V] exists. The teacher's parameters are `frozen["teacher"]`; they get no gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rljax.algorithms.common.pairs import checked_zero_masked
from rljax.ops.distillation import DivergenceOfLogits, TokenComparison, columns_of_same_decisions
from rljax.ops.shapes import PerToken
from rljax.types import CompareFn, Distillation, Objective, WeightsFn, all_at_once

TokenTermFn = Callable[[TokenComparison, Distillation], PerToken]  # the loss of each decision


def divergence_term(found: TokenComparison, batch: Distillation) -> PerToken:
    """The divergence itself."""
    return found.divergence


def distillation_objective(
    compare: CompareFn, divergence: DivergenceOfLogits, weights: WeightsFn, term: TokenTermFn = divergence_term
) -> Objective:
    """Σ weight · term over a batch of `Distillation`.

    Args:
      divergence: (student logits, teacher logits, tokens) -> [..], one of `ops.distillation`.
      weights: one of `ops.weights`.
      term: (TokenComparison, Distillation) -> [B T], the loss of each decision.
    """

    def prepare(params, frozen, batch: Distillation, key, map_rows=all_at_once) -> Distillation:
        traj = checked_zero_masked(batch.traj)
        if batch.teacher_view is not None:
            view = checked_zero_masked(batch.teacher_view)
            traj = traj.replace(mask=traj.mask & rows_alike(batch.replace(traj=traj, teacher_view=view))[:, None])
            batch = batch.replace(teacher_view=view)
        return batch.replace(traj=traj, weight=weights(traj.mask, traj.segments, traj.group))

    def loss(params, frozen, batch: Distillation):
        mask = batch.traj.mask
        found = compare(params, frozen, batch, divergence)
        found = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), found)
        terms = jnp.where(mask, batch.weight * term(found, batch), 0.0)
        count = mask.sum().astype(float)
        metrics = {
            "divergence": (found.divergence.sum(), count),
            "logp": (found.logp.sum(), count),
            "teacher_logp": (found.teacher_logp.sum(), count),
        }
        return terms.sum(), metrics

    return Objective(prepare, loss)


def rows_alike(batch: Distillation) -> Bool[Array, " B"]:
    """Rows whose decisions are the same tokens in the teacher's view. The others cannot be compared: the objective
    leaves them out, as it does rows without a view (no decision in it).
    """
    traj = batch.traj
    view = batch.teacher_view
    columns = columns_of_same_decisions(traj.mask, view.mask)
    same_token = jnp.take_along_axis(view.actions, columns, axis=1) == traj.actions
    same_number = traj.mask.sum(axis=1) == view.mask.sum(axis=1)
    return same_number & (same_token | ~traj.mask).all(axis=1)
