"""Step-DPO: DPO on the first step in which two solutions differ (arXiv:2406.18629).

    L = (1/N) Σ_i -log σ(β(Δ(s_w) - Δ(s_l)))        eq. 2; Δ(s) = Σ_{t in s} [log π(a_t | s_t) - log π_ref(a_t | s_t)]

s_w and s_l are the right and the wrong step after the same right steps: those belong to the prompt and are no part of
the loss, nor is what follows. `step_ends` of the two trajectories marks the last token of each step.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rljax.algorithms.common.credit import require
from rljax.algorithms.dpo import dpo
from rljax.types import Objective, Pairs, PolicyFn, Trajectory, all_at_once


def step_dpo(policy: PolicyFn, beta: float = 0.5) -> Objective:
    """Step-DPO over `Pairs` of whole solutions with `step_ends`; the default β is that of the authors' scripts."""
    objective = dpo(policy, beta=beta)

    def prepare(params, frozen, batch: Pairs, key, map_rows=all_at_once) -> Pairs:
        return objective.prepare(params, frozen, first_differing_step(batch), key, map_rows)

    return objective._replace(prepare=prepare)


def first_differing_step(pairs: Pairs) -> Pairs:
    """The pairs with masks that keep the first step in which the completions differ.

    A pair of equal completions keeps no token. Raises ValueError if a trajectory has no `step_ends`.
    """
    require(pairs.chosen, "step_ends")
    require(pairs.rejected, "step_ends")
    width = max(pairs.chosen.mask.shape[1], pairs.rejected.mask.shape[1])
    differs = own_tokens(pairs.chosen, width) != own_tokens(pairs.rejected, width)
    first = jnp.argmax(differs, axis=1)

    def keep_step(traj):
        in_step = step_of(traj, first) & differs.any(axis=1)[:, None]
        return traj.replace(mask=in_step)

    return pairs.replace(chosen=keep_step(pairs.chosen), rejected=keep_step(pairs.rejected))


def own_tokens(traj: Trajectory, width: int) -> Int[Array, "B width"]:
    """The tokens of each completion, first to last, then -1."""
    order = jnp.argsort(~traj.mask, axis=1, stable=True)
    tokens = jnp.take_along_axis(jnp.where(traj.mask, traj.actions, -1), order, axis=1)
    return jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=-1)


def step_of(traj: Trajectory, number: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """The tokens of the step that the completion's token `number`, counted from 0, belongs to."""
    ends = traj.step_ends & traj.mask
    token_number = jnp.cumsum(traj.mask, axis=1) - 1
    step = jnp.cumsum(ends, axis=1) - ends
    wanted = (ends & (token_number < number[:, None])).sum(axis=1)
    return traj.mask & (step == wanted[:, None])
