"""Algorithm -> Algorithm: credit by the turns of a conversation, which `Trajectory.step_ends` marks.

Without a wrapper credit is that of the trajectory: a group-relative method compares sums of rewards, and GAE goes from
token to token over the observations between turns.

    turn_level     each turn is one decision
    turn_groups    each turn is compared with the turns of the same index in the group

Terms that change token rewards go outside, as in kl_in_reward(turn_level(ppo()), 0.01).
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.common.reward_shaping import with_rewards
from rljax.ops.returns import discounted_returns
from rljax.ops.sequences import sequence_sum
from rljax.ops.shapes import PerToken, Scalar, TokenMask
from rljax.ops.shaping import step_numbers, step_starts
from rljax.types import Algorithm, Array, Batch, Trajectory


def turn_level(algorithm: Algorithm) -> Algorithm:
    """The algorithm's credit with each turn as one decision, whose advantage all tokens of the turn get.

        R_j = Σ rewards in turn j        ppo: δ_j = R_j + γ V_{j+1} - V_j,  Â_j = δ_j + γ λ Â_{j+1}

    V_j is the value at the first token of turn j, where the observation before it has been read; the critic's target at
    each of its tokens is Â_j + V_j. γ and λ then act from turn to turn: turn-PPO (arXiv:2512.17008), but with ratios
    and clips of tokens. The bi-level GAE of VAGEN (arXiv:2510.16907) goes on from token to token inside a turn, which
    is left out.
    """

    def credit(traj, coefficients):
        require(traj, "step_ends")
        rewards, mask = decision_rewards(traj)
        starts = step_starts(traj.step_ends, mask)
        steps = step_numbers(traj.step_ends, mask)

        def of_turn(x):  # its sum, at the first token
            return None if x is None else jnp.where(starts, sequence_sum(x, mask, steps), 0.0)

        def has_turn(x):
            return None if x is None else of_turn(x.astype(float)) > 0

        final_values = traj.final_values
        if final_values is not None and traj.truncated is not None:
            final_values = jnp.where(traj.truncated, final_values, 0.0)
        turns = traj.replace(
            mask=starts,
            rewards=of_turn(rewards),
            terminated=has_turn(traj.terminated),
            truncated=has_turn(traj.truncated),
            final_values=of_turn(final_values),
        )
        return _over_turns(algorithm.credit(turns, coefficients), traj, mask, starts)

    return algorithm._replace(credit=credit)


def turn_groups(algorithm: Algorithm, gamma: Scalar = 1.0, trajectory_weight: float = 0.0) -> Algorithm:
    """The credit of a group-relative algorithm for each turn: its rewards-to-go among the group's turns of its index.

        G_ij = Σ_{j' ≥ j} γ^{j'-j} R_ij'        Â_ij = A(G_ij; turns j of the group) + w A(G_i; the group)

    A is the algorithm's advantage, as (G - mean)/(std + ε) for GRPO, G_i the whole reward of a conversation. Turns j
    are compared among the conversations that have one; a turn that no other has gets A = 0. GiGPO (arXiv:2505.10978)
    has w = 1 and compares turns that start in the same state, not those of one index; MT-GRPO (arXiv:2505.11821)
    compares the rewards of turns by themselves. Raises ValueError for a method that does not read the sum of rewards.

    Args:
      algorithm: one whose credit reads the sum of rewards, and groups. gamma: from turn to turn. trajectory_weight: w.
    """

    def credit(traj, coefficients):
        require(traj, "group", "step_ends")
        rewards, mask = decision_rewards(traj)
        steps = step_numbers(traj.step_ends, mask)
        starts = step_starts(traj.step_ends, mask)
        turn_rewards = jnp.where(starts, sequence_sum(rewards, mask, steps), 0.0)
        to_go = discounted_returns(turn_rewards, starts, gamma)
        batch = algorithm.credit(_turns_as_rows(traj, to_go, starts, steps), coefficients)
        columns = traj.mask.shape
        shaped = Batch(
            traj, batch.advantages.reshape(columns), batch.mask.reshape(columns), coefficients=batch.coefficients
        )
        by_turn = _over_turns(shaped, traj, mask, starts)
        if not trajectory_weight:
            return by_turn
        whole = algorithm.credit(traj, coefficients)
        advantages = by_turn.advantages + trajectory_weight * whole.advantages
        return by_turn.replace(advantages=advantages, mask=by_turn.mask & whole.mask)

    return with_rewards(algorithm, "turn_groups", credit)._replace(group_signal=None)


def _turns_as_rows(traj: Trajectory, to_go: PerToken, starts: TokenMask, steps: Array) -> Trajectory:
    """B·T rows of one column. Decisions are where turns start; turns of one index in one group are a group."""
    _, group = jnp.unique(traj.group, return_inverse=True, size=len(traj.group))

    def column(x):
        return x.reshape(-1, 1)

    return Trajectory(
        inputs=column(traj.inputs),
        actions=column(traj.actions),
        logp=column(traj.logp),
        mask=column(starts),
        rewards=column(to_go),
        group=(group[:, None] * traj.mask.shape[1] + steps).ravel(),
    )


def _over_turns(batch: Batch, traj: Trajectory, mask: TokenMask, starts: TokenMask) -> Batch:
    """The batch with what stands at the first token of each turn on all of its tokens."""
    steps = step_numbers(traj.step_ends, mask)

    def spread(x):
        return None if x is None else jnp.where(mask, sequence_sum(x, starts, steps), 0.0)

    learned = mask & (spread(batch.mask.astype(float)) > 0)
    return batch.replace(traj=traj, advantages=spread(batch.advantages), returns=spread(batch.returns), mask=learned)
