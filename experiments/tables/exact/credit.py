"""How well the credit of a token agrees with its exact advantage A(s, a) = Q(s, a) - V(s).

Correlations over the exact distribution of visited prefixes and tokens: `one` is that of the credit from a single
rollout, `mean` that of its average given (s, a). High `mean` and low `one`: right, but noisy. Low `mean`: wrong,
however many rollouts are averaged.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tables.exact.language import Tree, on_last_token, prefix_values, sequence_logps
from experiments.tables.exact.markdown import format_correlation, markdown_table
from experiments.tables.exact.problems import Problem, make_trajectory
from rljax.algorithms.grpo import grpo
from rljax.algorithms.reinforce import leave_one_out_baseline, reinforce
from rljax.ops.returns import discounted_returns, gae
from rljax.types import Algorithm

SEEDS = 50  # of noisy and of fitted critics; their figures are means over them
Correlations = dict[str, float]  # one, mean
jitted_gae = jax.jit(gae)


class Decisions(NamedTuple):
    """Every token of every completion of a problem, with its exact probability and advantage."""

    tree: Tree
    problem: Problem
    probs: np.ndarray  # [N] of completions
    rewards: np.ndarray  # [N]
    token_rewards: jax.Array  # [N T] the reward on the last token
    values: np.ndarray  # [S] V
    state_action: np.ndarray  # [N T] number of (prefix, token)
    advantages: np.ndarray  # [N T] A
    remaining_variance: np.ndarray  # [N T] variance of the reward given (prefix, token)


def exact_decisions(tree: Tree, problem: Problem) -> Decisions:
    """By enumeration."""
    probs = np.asarray(jnp.exp(sequence_logps(tree, problem.policy)))
    rewards = np.asarray(problem.rewards)
    token_rewards = on_last_token(tree, problem.rewards)
    values = np.asarray(prefix_values(tree, problem.policy, token_rewards))
    state_action = tree.prefix * tree.vocab_size + tree.actions
    mass = probs[:, None] * tree.mask

    def mean_given_state_action(x):
        total = np.bincount(state_action.ravel(), (mass * x[:, None]).ravel())
        return total / np.maximum(np.bincount(state_action.ravel(), mass.ravel()), 1e-300)

    q = mean_given_state_action(rewards)
    variance = mean_given_state_action(rewards**2) - q**2
    advantages = np.where(tree.mask, q[state_action] - values[tree.prefix], 0.0)
    remaining_variance = np.where(tree.mask, variance[state_action], 0.0)
    return Decisions(tree, problem, probs, rewards, token_rewards, values, state_action, advantages, remaining_variance)


# ------------------------------------------------------------------------------------------------------- correlations


def agreement(decisions: Decisions, credit, rows=None, probs=None, extra_variance: float = 0.0) -> Correlations:
    """Correlations of credit [M T] with the advantages.

    Row m is completion rows[m] and has probability probs[m]; default: all completions once. extra_variance: what the
    credit varies by beyond what its rows show.
    """
    tree = decisions.tree
    rows = np.arange(len(decisions.probs)) if rows is None else rows
    probs = decisions.probs if probs is None else probs
    mass = (probs[:, None] * tree.mask[rows]).ravel()
    credit = np.where(tree.mask[rows], np.asarray(credit), 0.0).ravel()
    state_action = decisions.state_action[rows].ravel()
    advantages = decisions.advantages[rows].ravel()
    average = np.bincount(state_action, mass * credit) / np.maximum(np.bincount(state_action, mass), 1e-300)

    def covariance(x, y):
        return mass @ (x * y) / mass.sum() - (mass @ x) * (mass @ y) / mass.sum() ** 2

    def correlation(x, extra_variance=0.0):
        variances = (covariance(x, x) + extra_variance) * covariance(advantages, advantages)
        return covariance(x, advantages) / np.sqrt(max(variances, 1e-300))

    return {"one": correlation(credit, extra_variance), "mean": correlation(average[state_action])}


def group_agreement(decisions: Decisions, algorithm: Algorithm, group_size: int) -> Correlations:
    """Of the credit that `algorithm` gives the first completion of a group."""
    groups = np.array(list(itertools.product(range(len(decisions.probs)), repeat=group_size)))
    traj = make_trajectory(decisions.tree, decisions.problem, algorithm.needs, algorithm.reads == "scores")

    def credit_of_first(group):
        return algorithm.credit(jax.tree.map(lambda x: x[group], traj), {}).advantages[0]

    credit = jax.jit(jax.vmap(credit_of_first))(jnp.asarray(groups))
    return agreement(decisions, credit, groups[:, 0], decisions.probs[groups].prod(1))


def gae_agreement(decisions: Decisions, values, lam: float) -> Correlations:
    """Of generalized advantage estimation with a critic's values [S]."""
    tree = decisions.tree
    values = jnp.where(tree.mask, jnp.asarray(values)[tree.prefix], 0.0)
    values = jnp.pad(values, ((0, 0), (0, 1)))
    return agreement(decisions, jitted_gae(decisions.token_rewards, values, jnp.asarray(tree.mask), 1.0, lam))


def prefix_rollout_agreement(decisions: Decisions, count: int) -> Correlations:
    """Of VinePPO (arXiv:2410.01679): V of each prefix is the mean reward of `count` new completions of it.

    In closed form: the mean is A, and the prefixes before and after a token each add the variance of their rewards
    divided by `count`.
    """
    tree = decisions.tree
    mass = decisions.probs[:, None] * tree.mask
    second_moment = np.asarray(prefix_values(tree, decisions.problem.policy, decisions.token_rewards**2))
    variance_before = (second_moment - decisions.values**2)[tree.prefix]
    extra_variance = (mass * (variance_before + decisions.remaining_variance)).sum() / mass.sum() / count
    return agreement(decisions, np.where(tree.mask, decisions.advantages, 0.0), extra_variance=extra_variance)


# ------------------------------------------------------------------------------------------------------------ critics


def sample_completions(decisions: Decisions, seed: int, count: int) -> np.ndarray:
    """Their numbers. [count]"""
    rng = np.random.default_rng(seed)
    return rng.choice(len(decisions.probs), size=count, p=decisions.probs / decisions.probs.sum())


def fit_means(decisions: Decisions, seed: int, count: int) -> np.ndarray:
    """A critic fitted to `count` completions: the mean reward after each prefix; of all, where it was not seen."""
    tree = decisions.tree
    rows = sample_completions(decisions, seed, count)
    prefixes = tree.prefix[rows][tree.mask[rows]]
    rewards = np.repeat(decisions.rewards[rows], tree.mask[rows].sum(1))
    visits = np.bincount(prefixes, minlength=tree.num_prefixes)
    total = np.bincount(prefixes, rewards, minlength=tree.num_prefixes)
    return np.where(visits > 0, total / np.maximum(visits, 1), decisions.rewards[rows].mean())


def fit_td(decisions: Decisions, seed: int, count: int, learning_rate: float = 0.1) -> np.ndarray:
    """A critic after one pass of TD(0) over `count` completions, from 0."""
    tree = decisions.tree
    values = np.zeros(tree.num_prefixes)
    for row in sample_completions(decisions, seed, count):
        path = tree.prefix[row][tree.mask[row]]
        for prefix, next_prefix in zip(path, [*path[1:], None], strict=True):
            target = decisions.rewards[row] if next_prefix is None else values[next_prefix]
            values[prefix] += learning_rate * (target - values[prefix])
    return values


def mean_over_seeds(results: list[Correlations]) -> Correlations:
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


# ------------------------------------------------------------------------------------------------------------- tables


def outcome_credit(tree: Tree, problem: Problem) -> dict[str, Correlations]:
    """Credits without a critic."""
    decisions = exact_decisions(tree, problem)
    mask = jnp.asarray(tree.mask)
    rewards = decisions.rewards[:, None] + 0.0 * tree.mask
    lengths = tree.mask.sum(1, keepdims=True)
    reference_values = prefix_values(tree, problem.reference, decisions.token_rewards)
    rows = {
        "reward of the completion": agreement(decisions, rewards),
        "reward spread evenly over the tokens": agreement(decisions, rewards / lengths),
    }
    for size in (2, 3):
        algorithms = {
            "reward - group mean": grpo(std_epsilon=None),
            "reward - mean of the others": reinforce(leave_one_out_baseline),
            "GRPO (group's std too)": grpo(),
        }
        for name, algorithm in algorithms.items():
            rows[f"{name}, of {size}"] = group_agreement(decisions, algorithm, size)
    step_returns = discounted_returns(problem.token_rewards, mask)
    rows["this and later step rewards, arbitrary"] = agreement(decisions, step_returns)
    to_go = rewards - np.asarray(reference_values)[tree.prefix]
    rows["this and later step rewards, from the reference's values"] = agreement(decisions, to_go)
    step_reward = gae_agreement(decisions, reference_values, 0.0)
    rows["step reward alone, from the reference's values"] = step_reward
    for count in (1, 4, 16, 64):
        name = f"{count} new completions from each prefix (VinePPO)"
        rows[name] = prefix_rollout_agreement(decisions, count)
    return rows


def critic_credit(
    tree: Tree, problem: Problem, lambdas: tuple[float, ...] = (0.0, 0.95, 1.0)
) -> dict[str, dict[float, Correlations]]:
    """Generalized advantage estimation, by critic and λ."""
    decisions = exact_decisions(tree, problem)
    exact = decisions.values
    reward_std = np.sqrt(decisions.probs @ decisions.rewards**2 - (decisions.probs @ decisions.rewards) ** 2)
    error = np.random.default_rng(0).normal(size=(SEEDS, tree.num_prefixes)) * reward_std
    critics = {
        "exact": [exact],
        "none (0)": [0 * exact],
        "exact + error of ½ std of R": exact + 0.5 * error,
        "exact + error of 1 std of R": exact + error,
    }
    for count in (16, 256):
        means = [fit_means(decisions, seed, count) for seed in range(SEEDS)]
        critics[f"means after {count} completions"] = means
        td_values = [fit_td(decisions, seed, count) for seed in range(SEEDS)]
        critics[f"TD(0), rate 0.1, {count} completions"] = td_values
    return {
        name: {lam: mean_over_seeds([gae_agreement(decisions, v, lam) for v in values]) for lam in lambdas}
        for name, values in critics.items()
    }


def outcome_table(tree: Tree, problem: Problem, binary: Problem) -> str:
    """Credits without a critic, with normal rewards and with rewards of 0 and 1."""
    normal = outcome_credit(tree, problem)
    zero_one = outcome_credit(tree, binary)
    rows = []
    for name in sorted(normal, key=lambda name: -normal[name]["one"]):
        row = {"credit": name}
        for suffix, found in {"": normal, ", rewards 0 or 1": zero_one}.items():
            for kind in ("one", "mean"):
                row[kind + suffix] = format_correlation(found[name][kind])
        rows.append(row)
    return markdown_table(rows)


def critic_table(tree: Tree, problem: Problem) -> str:
    """A row for each critic."""
    rows = []
    for name, by_lambda in critic_credit(tree, problem).items():
        row = {"critic": name}
        for lam, correlations in by_lambda.items():
            for kind in ("one", "mean"):
                row[f"{kind}, λ = {lam}"] = format_correlation(correlations[kind])
        rows.append(row)
    return markdown_table(rows)
