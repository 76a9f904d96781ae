"""What a step samples: fresh prompts; with `batches.wait`, also the groups that the last step did not wait for."""

from collections.abc import Callable
from functools import partial

from rljax.rollouts.sampler import sample

from options import Batches
from rljax.data.prompts import Prompts
from rljax.rollouts import partial as rollouts
from rljax.train.mesh import Shardings, shard_prompts
from rljax.types import LM, Rows, Sampling, TrainState, Trajectory


def width(prompts: Prompts, sampling: Sampling) -> int:
    """Columns of a prompt and its answer together."""
    return prompts.length + sampling.max_tokens


def nobody(batches: Batches, prompts: Prompts, sampling: Sampling) -> dict | None:
    """`TrainState.extra` at the start: nobody waits."""
    if not batches.wait:
        return None
    return rollouts.empty_carry(batches.wait, batches.group, width(prompts, sampling))


def make_draw(
    lm: LM, prompts: Prompts, batches: Batches, sampling: Sampling, shardings: Shardings, seed: int
) -> Callable[[TrainState, int], tuple[Trajectory, Rows, TrainState]]:
    """draw(state, step) -> trajectory of prompts x oversample whole groups, their rows, the state with the others."""
    count, n, wait = batches.prompts * batches.oversample, batches.group, batches.wait
    if wait and lm.routing is not None:
        raise ValueError(
            "prompts that wait do not keep the experts that their tokens took; legal for a mixture: wait = 0"
        )
    columns = width(prompts, sampling)
    drawn = sampling.replace(stop_after=(count + wait) * n - wait) if wait else sampling

    def of_rows(state: TrainState, step: int, rows: Rows) -> Trajectory:
        return sample(lm, state.params, state.frozen, shard_prompts(shardings, rows), drawn, seed, step)

    def draw(state: TrainState, step: int):
        if not wait:
            rows = prompts.draw(state.cursor, count)
            return of_rows(state, step, rows), rows, state
        carried = rollouts.carry_from_arrays(state.extra, prompts.columns_of)
        fresh = prompts.draw(state.cursor, count + wait if carried is None else count)
        traj, rows, waiting = rollouts.partial_step(
            partial(of_rows, state, step), fresh, carried, n, wait, step, columns
        )
        return traj, rows, state.replace(extra=rollouts.carry_to_arrays(waiting))

    return draw
