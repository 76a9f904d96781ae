"""The exact mean and variance of the gradient that an Algorithm gives, and the objective whose gradient it is.

What is averaged runs through the library itself: `credit`, `weights`, `prepare` and `loss` on the Trajectory of every
group of G answers, N^G of them, each with its exact probability under the behaviour policy.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import jax
import jax.numpy as jnp

from exact.language import Tree, at_the_end, log_prob, sequence_kl, values, visits
from exact.worlds import World, facts, policy
from rljax.train.log import log_info
from rljax.train.objective import policy_objective
from rljax.types import Algorithm

BETA = 0.2  # of every KL term
ENTROPY = 0.2  # of the entropy bonus


def moments(algorithm: Algorithm, weightings: list[Callable], lm: Tree, worlds: World, answers: int) -> Callable:
    """() -> (mean [D W S·V], variance [D W]) of the ascent direction of one update on a group of `answers`.

    For D worlds (stacked) under each of W weightings; the variance is the trace of the covariance. A method that draws
    lots in `prepare` draws once for each group. Traced here; compiled and run by the call, in any thread.
    """

    def in_world(world: World, joint):
        traj, frozen = facts(lm, world, algorithm.needs), values(lm, world.behaviour, at_the_end(lm, world.rewards))
        probability = jnp.exp(log_prob(lm, world.behaviour)[joint].sum(1))

        def gradient(rows, number, which):
            pick = lambda mask, segments: jnp.stack([w(mask, segments) for w in weightings])[which]  # noqa: E731
            objective = policy_objective(policy, algorithm._replace(weights=pick))
            batch = algorithm.credit(jax.tree.map(lambda x: x[rows], traj), {})
            batch = objective.prepare(world.policy, frozen, batch, jax.random.fold_in(jax.random.key(0), number))
            return -jax.grad(lambda table: objective.loss(table, frozen, batch)[0])(world.policy).ravel()

        def under(which):
            g = jax.vmap(gradient, (0, 0, None))(joint, jnp.arange(len(joint)), which)
            mean = probability @ g
            return mean, probability @ ((g - mean[None]) ** 2).sum(1)

        return jax.lax.map(under, jnp.arange(len(weightings)))

    # An argument, not a constant: XLA would fold what follows from a constant, an element at a time.
    joint = jnp.asarray(list(itertools.product(range(len(lm.mask)), repeat=answers)))
    traced = jax.jit(lambda worlds, joint: jax.lax.map(lambda w: in_world(w, joint), worlds)).lower(worlds, joint)
    quickly = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
    return lambda: jax.device_get(traced.compile(quickly)(worlds, joint))


def measure(algorithms: Mapping, weightings: Iterable[Callable], lm: Tree, places: list[World], answers: int) -> dict:
    """{algorithm: (mean [D W S·V], variance [D W])} in D places; weighting 0 is its own, then come `weightings`."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *places)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: pool.submit(moments(x, [x.weights, *weightings], lm, stacked, answers))
            for name, x in algorithms.items()
        }
        found = {}
        for name, job in jobs.items():
            found[name] = job.result()
            log_info(f"groups of {answers}: {name}")
        return found


def objectives(lm: Tree, world: World, answers: int) -> dict[str, jax.Array]:
    """Gradients by the policy's table of what a method may turn out to climb."""
    R, n = world.rewards, jnp.asarray(lm.mask.sum(1))
    log_ref, log_teacher = jax.nn.log_softmax(world.reference), jax.nn.log_softmax(world.teacher)
    P, d = jnp.exp(log_prob(lm, world.policy)), visits(lm, world.policy)
    wins = jnp.sign(R[:, None] - R[None, :]) @ P

    def mean_of(pay):
        return lambda table: jnp.exp(log_prob(lm, table)) @ pay

    def with_divergence(of_prefix):
        return lambda table: mean_of(R)(table) - BETA * d @ of_prefix(jax.nn.log_softmax(table)).sum(1)

    def best_of_group(table):
        P = jnp.exp(log_prob(lm, table))
        up_to, below = ((R[None, :] <= R[:, None]) @ P) ** answers, ((R[None, :] < R[:, None]) @ P) ** answers
        return P / ((R[None, :] == R[:, None]) @ P) * (up_to - below) @ R

    functions = {
        "J": mean_of(R),
        "J_β": lambda table: mean_of(R)(table) - BETA * sequence_kl(lm, table, world.reference),
        "J per token": mean_of((R - P @ R) / n),
        "R per token": mean_of(R / n),
        "wins": mean_of(wins),
        "wins per token": mean_of(wins / n),
        "best of G": best_of_group,
        "J − β KL(π‖ref) at visits": with_divergence(lambda log_p: jnp.exp(log_p) * (log_p - log_ref)),
        "J − β KL(ref‖π) at visits": with_divergence(lambda log_p: jnp.exp(log_ref) * (log_ref - log_p)),
        "J − β KL(π‖teacher) at visits": with_divergence(lambda log_p: jnp.exp(log_p) * (log_p - log_teacher)),
        "J + c H at visits": with_divergence(lambda log_p: ENTROPY / BETA * jnp.exp(log_p) * log_p),
    }
    return {name: jax.grad(f)(world.policy).ravel() for name, f in functions.items()}


def compare(mean, truth) -> dict[str, float]:
    """Cosine; scale along the truth; bias relative to the truth, as it is and after dividing by the scale."""
    size, own = jnp.linalg.norm(truth), jnp.linalg.norm(mean)
    scale = mean @ truth / size**2
    cosine = jnp.where(own > 1e-9 * size, scale * size / jnp.maximum(own, 1e-300), jnp.nan)
    biased = jnp.linalg.norm(mean - truth) / size
    rest = jnp.linalg.norm(mean / jnp.where(scale == 0, 1.0, scale) - truth) / size
    return {"cosine": float(cosine), "scale": float(scale), "bias": float(biased), "rest": float(rest)}


def name_of(mean, truths: dict[str, jax.Array]) -> str:
    """The one of `truths` whose gradient this is, with its scale: decided by a cosine of 1 to 1e-9."""
    if jnp.linalg.norm(mean) < 1e-9 * jnp.linalg.norm(truths["J"]):
        return "0"
    for name, truth in truths.items():
        found = compare(mean, truth)
        if found["cosine"] > 1 - 1e-9:
            near = Fraction(found["scale"]).limit_denominator(48)
            exactly = abs(float(near) - found["scale"]) < 1e-9
            factor = str(near) if exactly else f"{found['scale']:.3g}"
            return name if factor == "1" else f"{factor} · ({name})" if "J " in name else f"{factor} · {name}"
    return "–"
