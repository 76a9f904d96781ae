"""TRPO's update: one natural-gradient step on the whole batch, in place of an optimizer's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rljax.ops.trust_region import line_search, natural_gradient_step
from rljax.train.mesh import Shardings
from rljax.train.update import compiled, constrain, in_micro_batches, summed
from rljax.types import Objective, TrainState


def make_trust_region_update(
    objective: Objective,
    divergence: Callable,
    delta: float = 0.01,
    damping: float = 0.1,
    iterations: int = 10,
    shrink: float = 0.8,
    trials: int = 10,
    fisher_every: int = 1,
    micro_batches: int = 1,
    shardings: Shardings | None = None,
) -> Callable:
    """update(state, batch) -> (state, metrics), as `update.make_update`'s; equations in `ops.trust_region`.

    The objective's loss is the surrogate: -ρÂ weighted (`algorithms.trpo`), no entropy bonus, no clip. No minibatches
    either: the trust region is around the parameters before the update, which should be those that sampled. Policy and
    critic must not share parameters; a critic's own, which neither surrogate nor KL sees, stay as they are.

    Args:
      divergence: (params, old, frozen, trajectory) -> KL [B T] at each decision: `models.policy.make_divergence`; or,
        of a policy that reports it, lambda params, old, frozen, traj: policy(params, frozen, traj).kl, `traj.dist`
        being the old distribution. Its mean over the decisions is what stays at or below `delta`.
      fisher_every: the Fisher matrix is that of every n-th row, as in Baselines (5): most of the cost is its products.
        Packed rows (`train.packing`) are other ones, so the step is another then.
      micro_batches: of every pass over the batch, Fisher products too. Five vectors as long as the parameters are alive
        besides, each whole on every device.

    Metrics: those of the loss; `kl_step`, `improvement` of the surrogate (0 where the search failed), what was expected
    of it to first order (`improvement_expected`), `line_search_trials`, and `accepted`: 1, or 0 where no candidate was
    good and all parameters are what they were.
    """

    def step(state: TrainState, frozen, batch):
        key, used = jax.random.split(state.key)
        batch, old = objective.prepare(state.params, frozen, batch, used), state.params

        def measured(params, batch):
            if shardings is not None:  # cut out of a flat vector, they would lie as that does
                params = constrain(params, shardings.state.params)

            def of_rows(rows):
                distance = divergence(params, old, frozen, rows.traj)
                kl = jnp.where(rows.mask, distance, 0.0).sum() / jnp.maximum(batch.mask.sum(), 1)
                return objective.loss(params, frozen, rows)[0], kl

            return in_micro_batches(of_rows, batch, micro_batches)

        loss, metrics, grads = summed(objective, old, frozen, batch, micro_batches, shardings)
        some = _every(batch, fisher_every, micro_batches)
        change, expected = natural_gradient_step(lambda p: measured(p, some)[1], old, grads, delta, damping, iterations)
        found = line_search(lambda p: measured(p, batch), old, loss, change, delta, shrink, trials)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "kl_step": found.kl, "accepted": found.accepted}
        metrics |= {"improvement": found.improvement, "improvement_expected": expected}
        metrics |= {"line_search_trials": found.trials}
        return state.replace(params=found.params, key=key), metrics

    return compiled(step, shardings)


def _every(batch, n: int, pieces: int):
    """Every n-th row, followed by so many masked ones that `pieces` divides them."""
    count = len(range(0, batch.mask.shape[0], n))
    fill = -count % pieces
    batch = jax.tree.map(lambda x: jnp.concatenate([x[::n], x[:fill]]) if jnp.ndim(x) else x, batch)
    return batch.replace(mask=batch.mask.at[count:].set(False))
