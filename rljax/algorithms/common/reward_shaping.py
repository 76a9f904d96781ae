"""Algorithm -> Algorithm: changes to rewards, rows and advantages, before or after `credit`.

What changes rewards is for methods that read their sum (`Algorithm.reads`), and raises ValueError for others: a term of
either sign added to rewards of 0 and 1 makes wrong completions right for those that ask which are correct, and those
that read the scores never see it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rljax.algorithms.common.credit import (
    ValidRows,
    correct_rows,
    decision_rewards,
    old_policy_logp,
    outcome_rewards,
    require,
)
from rljax.algorithms.common.wrappers import with_needs
from rljax.ops import shaping
from rljax.ops.kl import KLEstimator, k1
from rljax.ops.shapes import PerRow
from rljax.ops.statistics import masked_mean, whiten
from rljax.types import Algorithm, CreditFn, Trajectory

# (trajectory, outcome of each row, rows that are valid, coefficients) -> new outcome
OutcomeFn = Callable[[Trajectory, PerRow, ValidRows, dict[str, Any]], PerRow]
READ = {  # `Algorithm.reads` in words
    "correct": "asks which completions are correct",
    "steps": "reads rewards where steps end",
    "scores": "reads each score by itself",
}


def with_rewards(algorithm: Algorithm, wrapper: str, credit: CreditFn, *needs: str) -> Algorithm:
    """The algorithm with the credit of a wrapper that changes rewards. Raises ValueError where they are not summed."""
    if algorithm.reads != "rewards":
        raise ValueError(
            f"{wrapper} changes the rewards, and this method {READ[algorithm.reads]}; legal: without it, or a method "
            "that learns from the sum of rewards"
        )
    return with_needs(algorithm, *needs, credit=credit)


def kl_in_reward(algorithm: Algorithm, coefficient: float = 0.05, estimator: KLEstimator = k1) -> Algorithm:
    """r_t - β KL_t before credit, β = `coefficients["kl_reward"]` if the training state has one: the KL of PPO-RLHF,
    RLOO, ReMax and REINFORCE++ (arXiv:1909.08593). Unlike a KL term in the loss it also credits a token with the KL of
    later tokens.
    """

    def credit(traj, coefficients):
        beta = coefficients.get("kl_reward", coefficient)
        rewards = shaping.apply_kl_penalty(
            traj.rewards, old_policy_logp(traj), traj.ref_logp, traj.mask, beta, estimator
        )
        return algorithm.credit(traj.replace(rewards=rewards), coefficients)

    return with_rewards(algorithm, "kl_in_reward", credit, "ref_logp")


def missing_eos_penalty(algorithm: Algorithm, penalty: float = 1.0) -> Algorithm:
    """Takes `penalty` from the reward of a completion that did not end by itself (TRL's setting of that name)."""

    def credit(traj, coefficients):
        return algorithm.credit(penalize_missing_eos(traj, penalty), coefficients)

    return with_rewards(algorithm, "missing_eos_penalty", credit)


def penalize_missing_eos(traj: Trajectory, penalty: float) -> Trajectory:
    """The trajectory with `penalty` less on the last decision of each row that did not terminate."""
    require(traj, "rewards", "terminated")
    ended = (traj.terminated & traj.mask).any(axis=1)
    change = jnp.where(ended, 0.0, -penalty).astype(traj.rewards.dtype)
    return traj.replace(rewards=traj.rewards + shaping.at_last_decision(change, traj.mask))


def clip_reward(algorithm: Algorithm, limit: float = 10.0) -> Algorithm:
    """Rewards of rows within ±`limit`. OpenRLHF clips all rewards to ±10, after the baseline where there is one. Inside
    it stand terms that are not to be clipped: `clip_reward(kl_in_reward(ppo()))`.
    """

    def shaped(traj, rewards, valid, coefficients):
        return jnp.clip(rewards, -limit, limit)

    return _reshape_outcome(algorithm, "clip_reward", shaped)


def whiten_rewards(algorithm: Algorithm) -> Algorithm:
    """(r_t - μ)/σ + μ, with mean and deviation over all decisions of the batch (TRL's setting of that name, for PPO).

    Outside it stand the terms that are whitened with the rewards: `kl_in_reward(whiten_rewards(ppo()))`.
    """

    def credit(traj, coefficients):
        rewards, mask = decision_rewards(traj)
        mean = masked_mean(rewards, mask)
        whitened = jnp.where(mask, whiten(rewards, mask) + mean, traj.rewards)  # rows without a reward keep their NaN
        return algorithm.credit(traj.replace(rewards=whitened), coefficients)

    return with_rewards(algorithm, "whiten_rewards", credit)


def overlong_penalty(algorithm: Algorithm, max_completion_length: int, cache: int) -> Algorithm:
    """Adds DAPO's soft overlong punishment to the reward (arXiv:2503.14476, eq. 13;
    `shaping.soft_overlong_punishment`).
    """

    def credit(traj, coefficients):
        penalty = shaping.soft_overlong_punishment(traj.mask.sum(axis=1), max_completion_length, cache)
        rewards = traj.rewards + shaping.at_last_decision(penalty.astype(traj.rewards.dtype), traj.mask)
        return algorithm.credit(traj.replace(rewards=rewards), coefficients)

    return with_rewards(algorithm, "overlong_penalty", credit)


def _reshape_outcome(algorithm: Algorithm, wrapper: str, shaped: OutcomeFn) -> Algorithm:
    """The algorithm on rewards whose sum over row i is shaped(...)[i]: the change is added on the last decision."""

    def credit(traj, coefficients):
        rewards, valid = outcome_rewards(traj)
        change = (shaped(traj, rewards, valid, coefficients) - rewards).astype(traj.rewards.dtype)
        return algorithm.credit(
            traj.replace(rewards=traj.rewards + shaping.at_last_decision(change, traj.mask)), coefficients
        )

    return with_rewards(algorithm, wrapper, credit)


def lcpo_exact(algorithm: Algorithm, target_length: int, alpha: float = 3e-4) -> Algorithm:
    """Completions of `target_length` tokens (L1, arXiv:2503.04697; `shaping.exact_length_reward`, which also takes a
    target for each prompt, where rewards are made).
    """

    def shaped(traj, rewards, valid, coefficients):
        return shaping.exact_length_reward(rewards, traj.mask.sum(axis=1), target_length, alpha)

    return _reshape_outcome(algorithm, "lcpo_exact", shaped)


def lcpo_max(algorithm: Algorithm, target_length: int, alpha: float = 3e-4, delta: float = 0.5) -> Algorithm:
    """Completions of at most `target_length` tokens (L1, arXiv:2503.04697; `shaping.max_length_reward`, which also
    takes a target for each prompt, where rewards are made).
    """

    def shaped(traj, rewards, valid, coefficients):
        return shaping.max_length_reward(rewards, traj.mask.sum(axis=1), target_length, alpha, delta)

    return _reshape_outcome(algorithm, "lcpo_max", shaped)


def group_length_reward(algorithm: Algorithm, coefficient: float = 1.0, above: float = 0.0) -> Algorithm:
    """Adds Kimi k1.5's length reward (arXiv:2501.12599; `shaping.relative_length_reward`) times a weight, which is
    `coefficients["length"]` if the training state has one: the paper starts without it. A completion is correct if its
    first score is above `above` (`correct_rows`). The paper does not give the weight.
    """

    def shaped(traj, rewards, valid, coefficients):
        require(traj, "group")
        lengths = traj.mask.sum(axis=1)
        correct, _ = correct_rows(traj, above)
        added = shaping.relative_length_reward(correct, lengths, traj.group, valid)
        return rewards + coefficients.get("length", coefficient) * added

    return _reshape_outcome(algorithm, "group_length_reward", shaped)


def cosine_length_reward(
    algorithm: Algorithm,
    max_completion_length: int,
    correct_range: tuple[float, float] = (2.0, 1.0),
    incorrect_range: tuple[float, float] = (-10.0, 0.0),
    exceeded: float = -10.0,
    above: float = 0.0,
) -> Algorithm:
    """The reward becomes a cosine of the length, one for correct completions, whose first score is above `above`
    (`correct_rows`), and another for the rest (arXiv:2502.03373; `shaping.cosine_reward`).
    """

    def shaped(traj, rewards, valid, coefficients):
        lengths = traj.mask.sum(axis=1)
        correct, _ = correct_rows(traj, above)
        return shaping.cosine_reward(correct, lengths, max_completion_length, correct_range, incorrect_range, exceeded)

    return _reshape_outcome(algorithm, "cosine_length_reward", shaped)


def filter_overlong(algorithm: Algorithm) -> Algorithm:
    """Completions cut by the length limit count for the advantages of the others but are not learned from (overlong
    filtering: DAPO, arXiv:2503.14476, section 3.4): they leave the mask, so that weights do not count them either.
    """

    def credit(traj, coefficients):
        require(traj, "truncated")
        batch = algorithm.credit(traj, coefficients)
        cut = (traj.truncated & traj.mask).any(axis=1, keepdims=True)
        return batch.replace(mask=batch.mask & ~cut)

    return algorithm._replace(credit=credit)


def distill(algorithm: Algorithm, coefficient: float = 1.0) -> Algorithm:
    """Â_t + c (log π_teacher - log π_old): on-policy distillation, the reverse KL to a teacher token by token, from the
    sampled tokens. Over the whole vocabulary, without rewards: `gkd` with β = 1.
    """

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, coefficients)
        gap = jnp.where(batch.mask, traj.teacher_logp - old_policy_logp(traj), 0.0)
        return batch.replace(advantages=batch.advantages + coefficients.get("distill", coefficient) * gap)

    return with_needs(algorithm, "teacher_logp", credit=credit)
