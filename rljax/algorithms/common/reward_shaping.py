"""Algorithm -> Algorithm: changes to rewards, rows and advantages, before or after `credit`."""

import jax.numpy as jnp

from rljax.algorithms.common.credit import old_policy_logp, require
from rljax.algorithms.common.wrappers import with_needs
from rljax.ops import shaping
from rljax.ops.kl import KLEstimator, k1
from rljax.types import Algorithm


def kl_in_reward(algorithm: Algorithm, coefficient: float = 0.05, estimator: KLEstimator = k1) -> Algorithm:
    """r_t - β KL_t before credit, β = `coefficients["kl_reward"]` if the training state has one: the KL of PPO-RLHF,
    RLOO, ReMax and REINFORCE++ (arXiv:1909.08593). Unlike a KL term in the loss it also credits a token with the KL of
    later tokens. Not for methods that read rewards at the ends of steps only (`grpo_process`, `capo`) or not at all
    (`gdpo`).
    """

    def credit(traj, coefficients):
        beta = coefficients.get("kl_reward", coefficient)
        rewards = shaping.apply_kl_penalty(
            traj.rewards, old_policy_logp(traj), traj.ref_logp, traj.mask, beta, estimator
        )
        return algorithm.credit(traj.replace(rewards=rewards), coefficients)

    return with_needs(algorithm, "ref_logp", credit=credit)


def overlong_penalty(algorithm: Algorithm, max_completion_length: int, cache: int) -> Algorithm:
    """Adds DAPO's soft overlong punishment to the reward (arXiv:2503.14476, eq. 13;
    `shaping.soft_overlong_punishment`).
    """

    def credit(traj, coefficients):
        penalty = shaping.soft_overlong_punishment(traj.mask.sum(axis=1), max_completion_length, cache)
        rewards = traj.rewards + shaping.at_last_decision(penalty.astype(traj.rewards.dtype), traj.mask)
        return algorithm.credit(traj.replace(rewards=rewards), coefficients)

    return algorithm._replace(credit=credit)


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
    """Â_t + c (log π_teacher - log π_old): on-policy distillation, the reverse KL to a teacher token by token."""

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, coefficients)
        gap = jnp.where(batch.mask, traj.teacher_logp - old_policy_logp(traj), 0.0)
        return batch.replace(advantages=batch.advantages + coefficients.get("distill", coefficient) * gap)

    return with_needs(algorithm, "teacher_logp", credit=credit)
