"""Who chose, who is trained and what is paid; and the Trajectory and the policy that the library is given of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exact.language import Tree, at_the_end, chosen, sequence_kl, values
from rljax.types import PolicyOutput, Trajectory


class World(NamedTuple):
    """Tables are logits [S V]."""

    policy: jax.Array
    behaviour: jax.Array
    reference: jax.Array
    teacher: jax.Array
    rewards: jax.Array  # [N] of whole answers
    steps: jax.Array  # [N T] the same, paid decision by decision
    scores: jax.Array  # [N 2] the same, as the sum of two verifiers


def random_world(lm: Tree, seed: int, binary: bool = False) -> tuple[World, jax.Array]:
    """A world on-policy, and a table towards which its behaviour policy may be moved.

    Rewards are normal around 1, or 1 for about half of the answers. Steps before the last are paid at random.
    """
    draw = np.random.default_rng(seed)
    policy, other, reference, teacher = map(jnp.asarray, draw.normal(size=(4, lm.prefixes, lm.vocabulary)))
    rewards, part = draw.normal(size=(2, len(lm.mask)))
    rewards = np.where(rewards > 0.0, 1.0, 0.0) if binary else 1.0 + rewards
    early = 0.5 * draw.normal(size=(lm.prefixes, lm.vocabulary))[lm.prefix, lm.actions]
    last = np.asarray(at_the_end(lm, jnp.ones(len(rewards)))) > 0
    early = np.where(lm.mask & ~last, early, 0.0)
    steps = np.where(last, (rewards - early.sum(1))[:, None], early)
    paid = map(jnp.asarray, (rewards, steps, np.stack([part, rewards - part], axis=1)))
    return World(policy, policy, reference, teacher, *paid), other


def at_distance(lm: Tree, world: World, other, nats: float) -> World:
    """The behaviour policy moved towards `other` until KL(behaviour ‖ policy) of whole answers is `nats`."""

    def mix(share):
        return (1 - share) * world.policy + share * other

    low, high = 0.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        near = sequence_kl(lm, mix(middle), world.policy) < nats
        low, high = (middle, high) if near else (low, middle)
    return world._replace(behaviour=mix(low))


def moved(lm: Tree, seed: int, distances: tuple[float, ...]) -> list[World]:
    """A random world on-policy, and with its behaviour policy at each of the distances."""
    world, other = random_world(lm, seed)
    return [world, *(at_distance(lm, world, other, nats) for nats in distances)]


def coin(p: float) -> World:
    """One token decides (`tree(2, 1)`): right, and paid 1, with probability p."""
    table, even, rewards = jnp.array([[0.0, jnp.log(p / (1 - p))]]), jnp.zeros((1, 2)), jnp.array([0.0, 1.0])
    return World(table, table, even, even, rewards, rewards[:, None], jnp.stack([rewards, 0 * rewards], axis=1))


def facts(lm: Tree, world: World, needs: tuple[str, ...] = ()) -> Trajectory:
    """The N answers as rows of one Trajectory with every fact a method may ask for.

    The critic knows the behaviour policy's exact values. `old_logp` is the trained policy before its update; `baseline`
    the reward of the greedy answer; each token is a step, paid `steps` if the method reads `step_ends`.
    """
    rewards = world.steps if "step_ends" in needs else at_the_end(lm, world.rewards)
    last = at_the_end(lm, jnp.ones(len(lm.mask))) > 0
    log_mu = jax.nn.log_softmax(world.behaviour)
    greedy = jnp.all((lm.actions == jnp.argmax(log_mu, 1)[lm.prefix]) | ~lm.mask, axis=1)
    V = jnp.where(lm.mask, values(lm, world.behaviour, rewards)[lm.prefix], 0.0)
    ended = np.broadcast_to(lm.ended, len(lm.mask))[:, None]
    return Trajectory(
        inputs=jnp.asarray(lm.prefix),
        actions=jnp.asarray(lm.actions),
        mask=jnp.asarray(lm.mask),
        logp=chosen(lm, world.behaviour),
        positions=jnp.where(lm.mask, jnp.arange(lm.mask.shape[1])[None], 0),
        segments=jnp.asarray(lm.mask, jnp.int32),
        temperature=jnp.ones(lm.mask.shape),
        group=jnp.zeros(len(lm.mask), jnp.int32),
        scores=world.scores,
        rewards=rewards,
        step_ends=jnp.asarray(lm.mask),
        baseline=jnp.full(len(lm.mask), (greedy * world.rewards).sum()),
        old_logp=chosen(lm, world.policy) if "old_logp" in needs else None,
        ref_logp=chosen(lm, world.reference),
        teacher_logp=chosen(lm, world.teacher),
        values=jnp.pad(V, ((0, 0), (0, 1))),
        terminated=last & ended,
        truncated=last & ~ended,
        dist=log_mu[lm.prefix],
        version=jnp.zeros(lm.mask.shape, jnp.int32),
        sum_pi_squared=(jnp.exp(log_mu) ** 2).sum(1)[lm.prefix],
    )


def policy(table, frozen, traj: Trajectory) -> PolicyOutput:
    """The policy that `policy_objective` asks: a softmax of the row of the prefix; `frozen` are its values. [S]"""
    log_p = jax.nn.log_softmax(table)[traj.inputs]
    return PolicyOutput(
        logp=jnp.take_along_axis(log_p, traj.actions[..., None], axis=-1)[..., 0],
        entropy=-(jnp.exp(log_p) * log_p).sum(-1),
        values=frozen[traj.inputs],
        kl=(jnp.exp(traj.dist) * (traj.dist - log_p)).sum(-1),
        sum_pi_squared=(jnp.exp(log_p) ** 2).sum(-1),
    )
