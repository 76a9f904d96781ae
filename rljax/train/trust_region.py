"""TRPO's update: one natural-gradient step on the whole batch, in place of an optimizer's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rljax.ops.trust_region import line_search, natural_gradient_step
from rljax.train.mesh import Shardings
from rljax.train.shared_prefix import with_own_prefixes
from rljax.train.update import (
    UpdateFn,
    accumulate_gradients,
    constrain_shardings,
    jit_update,
    map_micro_batches,
    sum_over_micro_batches,
)
from rljax.types import Array, DivergenceFn, Objective, Params, TrainState


def make_trust_region_update(
    objective: Objective,
    divergence: DivergenceFn,
    delta: float = 0.01,
    damping: float = 0.1,
    iterations: int = 10,
    shrink: float = 0.8,
    trials: int = 10,
    fisher_every: int = 1,
    micro_batches: int = 1,
    shardings: Shardings | None = None,
) -> UpdateFn:
    """update(state, batch) -> (state, metrics), as `update.make_update`'s; equations in `ops.trust_region`.

    The objective's loss is the surrogate: -ρÂ weighted (`algorithms.trpo`), without entropy bonus and clipping. Do not
    cut minibatches: the trust region is around the parameters before the update, which should be those that sampled.
    Policy and critic must not share parameters; a critic's own, which neither surrogate nor KL depends on, do not
    change.

    Args:
      divergence: `models.policy.make_divergence`; or, for a policy that reports its KL to `traj.dist`,
        lambda params, old, frozen, traj: policy(params, frozen, traj).kl. Its mean over the decisions stays at or below
        `delta`.
      damping: added to the Fisher matrix. iterations: of conjugate gradients.
      shrink, trials: of the line search: factor of the step from one candidate to the next, and number of candidates.
      fisher_every: the Fisher matrix is estimated from every n-th row, as in Baselines (5): its products are most of
        the cost. Packing (`train.packing`) changes which rows these are, and so the step.
      micro_batches: of every pass over the batch, Fisher products included. Five more vectors of the size of the
        parameters are kept, each whole on every device.

    Metrics: those of the loss; `kl_step`; `improvement` of the surrogate (0 where the search failed) and what was
    expected of it to first order (`improvement_expected`); `line_search_trials`; `accepted`: 1, or 0 where no candidate
    was accepted and the parameters did not change.
    """

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key, prepare_key = jax.random.split(state.key)
        map_rows = partial(map_micro_batches, micro_batches=micro_batches)
        batch = objective.prepare(state.params, frozen, batch, prepare_key, map_rows)
        # A candidate is not the old policy: `old_logp` stays what was annotated, for it and for the old parameters.
        batch = batch.replace(coefficients={k: v for k, v in batch.coefficients.items() if k != "at_old_policy"})
        old = state.params

        def loss_and_kl(params, batch):
            """Of these parameters: the surrogate, and the mean KL over the decisions of the batch."""
            if shardings is not None:  # parameters cut out of a flat vector would keep its sharding
                params = constrain_shardings(params, shardings.state.params)

            def of_rows(rows):
                distance = divergence(params, old, frozen, rows.traj)
                kl = jnp.where(rows.mask, distance, 0.0).sum() / jnp.maximum(batch.mask.sum(), 1)
                loss, _ = objective.loss(params, frozen, rows)
                return loss, kl

            return sum_over_micro_batches(of_rows, batch, micro_batches)

        def fisher_kl(params):
            _, kl = loss_and_kl(params, fisher_batch)
            return kl

        loss, metrics, grads = accumulate_gradients(objective, old, frozen, batch, micro_batches, shardings)
        fisher_batch = _every_nth_row(batch, fisher_every, micro_batches)
        change, expected = natural_gradient_step(fisher_kl, old, grads, delta, damping, iterations)
        found = line_search(lambda params: loss_and_kl(params, batch), old, loss, change, delta, shrink, trials)
        metrics |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "kl_step": found.kl,
            "accepted": found.accepted,
            "improvement": found.improvement,
            "improvement_expected": expected,
            "line_search_trials": found.trials,
        }
        return state.replace(params=found.params, key=key), metrics

    return jit_update(step, shardings)


def _every_nth_row(batch: Any, n: int, pieces: int) -> Any:
    """Every n-th row, followed by as many masked ones as it takes for `pieces` to divide them."""
    batch = with_own_prefixes(batch)
    count = len(range(0, batch.mask.shape[0], n))
    fill = -count % pieces
    batch = jax.tree.map(lambda x: jnp.concatenate([x[::n], x[:fill]]) if jnp.ndim(x) else x, batch)
    return batch.replace(mask=batch.mask.at[count:].set(False))
