"""Policies and rewards for the completions of a tree, and the Trajectory and PolicyOutput that the library reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tables.exact.language import Tree, on_last_token, prefix_values, sequence_kl, token_logps
from rljax.types import PolicyOutput, Trajectory


class Problem(NamedTuple):
    """Policies are logits [S V]."""

    policy: jax.Array  # the one that is trained
    behavior: jax.Array  # the one that samples
    reference: jax.Array
    teacher: jax.Array
    rewards: jax.Array  # [N] of each completion
    token_rewards: jax.Array  # [N T] the same, spread over the tokens
    scores: jax.Array  # [N 2] the same, as the sum of two verifiers


def random_problem(tree: Tree, seed: int, binary: bool = False) -> tuple[Problem, jax.Array]:
    """An on-policy problem, and logits towards which its behavior policy may be moved.

    Rewards are normal around 1; with `binary` they are 1 for about half of the completions, else 0. Rewards of tokens
    before the last one are random.
    """
    rng = np.random.default_rng(seed)
    policy, other, reference, teacher = map(jnp.asarray, rng.normal(size=(4, tree.num_prefixes, tree.vocab_size)))
    rewards, first_score = rng.normal(size=(2, len(tree.mask)))
    rewards = np.where(rewards > 0.0, 1.0, 0.0) if binary else 1.0 + rewards
    early = 0.5 * rng.normal(size=(tree.num_prefixes, tree.vocab_size))[tree.prefix, tree.actions]
    last = np.asarray(on_last_token(tree, jnp.ones(len(rewards)))) > 0
    early = np.where(tree.mask & ~last, early, 0.0)
    token_rewards = np.where(last, (rewards - early.sum(1))[:, None], early)
    scores = np.stack([first_score, rewards - first_score], axis=1)
    problem = Problem(
        policy,
        policy,
        reference,
        teacher,
        rewards=jnp.asarray(rewards),
        token_rewards=jnp.asarray(token_rewards),
        scores=jnp.asarray(scores),
    )
    return problem, other


def move_behavior(tree: Tree, problem: Problem, other, kl: float) -> Problem:
    """The behavior policy moved towards `other` until KL(behavior ‖ policy) of completions is `kl` nats: bisection."""

    def interpolate(share):
        return (1 - share) * problem.policy + share * other

    low = 0.0
    high = 8.0
    for _ in range(60):
        middle = (low + high) / 2
        if sequence_kl(tree, interpolate(middle), problem.policy) < kl:
            low = middle
        else:
            high = middle
    return problem._replace(behavior=interpolate(low))


def random_problems(tree: Tree, seed: int, kls: tuple[float, ...]) -> list[Problem]:
    """A random problem on-policy, and the same off-policy with each KL(behavior ‖ policy)."""
    problem, other = random_problem(tree, seed)
    return [problem, *(move_behavior(tree, problem, other, kl) for kl in kls)]


def coin_flip(p: float) -> Problem:
    """One token of two (`make_tree(2, 1)`): right, and paid 1, with probability p."""
    logits = jnp.array([[0.0, jnp.log(p / (1 - p))]])
    uniform = jnp.zeros((1, 2))
    rewards = jnp.array([0.0, 1.0])
    scores = jnp.stack([rewards, 0 * rewards], axis=1)
    return Problem(logits, logits, uniform, uniform, rewards, rewards[:, None], scores)


def make_trajectory(tree: Tree, problem: Problem, needs: tuple[str, ...] = (), with_scores: bool = False) -> Trajectory:
    """The N completions as rows of one Trajectory, with every field that an algorithm may need.

    The critic knows the exact values of the behavior policy. `old_logp` is the trained policy before its update;
    `baseline` the reward of the greedy completion; each token is a step, paid `token_rewards` if `needs` has
    `step_ends`. Without scores a completion is correct where its reward is above 0.
    """
    rewards = problem.token_rewards if "step_ends" in needs else on_last_token(tree, problem.rewards)
    last = on_last_token(tree, jnp.ones(len(tree.mask))) > 0
    log_behavior = jax.nn.log_softmax(problem.behavior)
    greedy = jnp.all((tree.actions == jnp.argmax(log_behavior, 1)[tree.prefix]) | ~tree.mask, axis=1)
    values = jnp.where(tree.mask, prefix_values(tree, problem.behavior, rewards)[tree.prefix], 0.0)
    ended = np.broadcast_to(tree.ended, len(tree.mask))[:, None]
    return Trajectory(
        inputs=jnp.asarray(tree.prefix),
        actions=jnp.asarray(tree.actions),
        mask=jnp.asarray(tree.mask),
        logp=token_logps(tree, problem.behavior),
        positions=jnp.where(tree.mask, jnp.arange(tree.mask.shape[1])[None], 0),
        segments=jnp.asarray(tree.mask, jnp.int32),
        temperature=jnp.ones(tree.mask.shape),
        group=jnp.zeros(len(tree.mask), jnp.int32),
        scores=problem.scores if with_scores else None,
        rewards=rewards,
        step_ends=jnp.asarray(tree.mask),
        baseline=jnp.full(len(tree.mask), (greedy * problem.rewards).sum()),
        old_logp=token_logps(tree, problem.policy) if "old_logp" in needs else None,
        ref_logp=token_logps(tree, problem.reference),
        teacher_logp=token_logps(tree, problem.teacher),
        values=jnp.pad(values, ((0, 0), (0, 1))),
        terminated=last & ended,
        truncated=last & ~ended,
        dist=log_behavior[tree.prefix],
        version=jnp.zeros(tree.mask.shape, jnp.int32),
        sum_pi_squared=(jnp.exp(log_behavior) ** 2).sum(1)[tree.prefix],
    )


def apply_policy(logits, values, traj: Trajectory) -> PolicyOutput:
    """What `policy_objective` calls: a softmax of the prefix's row of logits [S V]; `values` [S] are not trained."""
    log_p = jax.nn.log_softmax(logits)[traj.inputs]
    return PolicyOutput(
        logp=jnp.take_along_axis(log_p, traj.actions[..., None], axis=-1)[..., 0],
        entropy=-(jnp.exp(log_p) * log_p).sum(-1),
        values=values[traj.inputs],
        kl=(jnp.exp(traj.dist) * (traj.dist - log_p)).sum(-1),
        sum_pi_squared=(jnp.exp(log_p) ** 2).sum(-1),
    )
