"""The exact mean and variance of the gradient that an Algorithm gives, and the objective whose gradient the mean is.

The library's own `credit`, `weights`, `prepare` and `loss` are run on every group of G completions, N^G of them, each
weighted with its exact probability under the behavior policy.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import jax
import jax.numpy as jnp

from experiments.tables.exact.language import (
    Tree,
    on_last_token,
    prefix_values,
    sequence_kl,
    sequence_logps,
    visit_probs,
)
from experiments.tables.exact.problems import Problem, apply_policy, make_trajectory
from rljax.train.log import log_info
from rljax.train.objective import policy_objective
from rljax.types import Algorithm

BETA = 0.2  # coefficient of every KL term
ENTROPY_COEFFICIENT = 0.2  # of the entropy bonus
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
EXACT = 1e-9  # how far a cosine or a scale may be from the number it is called


def gradient_moments(
    algorithm: Algorithm, weightings: list[Callable], tree: Tree, problems: Problem, group_size: int
) -> Callable:
    """() -> (mean [D W S·V], variance [D W]) of the ascent direction of one update on one group.

    For D stacked problems under each of W weightings. The variance is the trace of the covariance. What a method draws
    at random in `prepare` is drawn once for each group. Traced here; compiled and run by the call, in any thread.
    """

    def in_problem(problem: Problem, groups):
        traj = make_trajectory(tree, problem, algorithm.needs, algorithm.reads == "scores")
        values = prefix_values(tree, problem.behavior, on_last_token(tree, problem.rewards))
        probability = jnp.exp(sequence_logps(tree, problem.behavior)[groups].sum(1))

        def gradient(rows, group_number, weighting):
            def weights(mask, segments, group):
                return jnp.stack([w(mask, segments, group) for w in weightings])[weighting]

            objective = policy_objective(apply_policy, algorithm._replace(weights=weights))
            batch = algorithm.credit(jax.tree.map(lambda x: x[rows], traj), {})
            key = jax.random.fold_in(jax.random.key(0), group_number)
            batch = objective.prepare(problem.policy, values, batch, key)
            loss_gradient = jax.grad(lambda logits: objective.loss(logits, values, batch)[0])(problem.policy)
            return -loss_gradient.ravel()

        def under_weighting(weighting):
            g = jax.vmap(gradient, (0, 0, None))(groups, jnp.arange(len(groups)), weighting)
            mean = probability @ g
            return mean, probability @ ((g - mean[None]) ** 2).sum(1)

        return jax.lax.map(under_weighting, jnp.arange(len(weightings)))

    def in_all_problems(problems, groups):
        return jax.lax.map(lambda problem: in_problem(problem, groups), problems)

    # An argument, not a constant: XLA would fold what follows from a constant, an element at a time.
    groups = jnp.asarray(list(itertools.product(range(len(tree.mask)), repeat=group_size)))
    traced = jax.jit(in_all_problems).lower(problems, groups)
    return lambda: jax.device_get(traced.compile(COMPILER_OPTIONS)(problems, groups))


def measure_gradients(
    algorithms: Mapping[str, Algorithm],
    weightings: Iterable[Callable],
    tree: Tree,
    problems: list[Problem],
    group_size: int,
) -> dict[str, tuple]:
    """{algorithm: (mean [D W S·V], variance [D W])} in D problems; weighting 0 is its own, then come `weightings`."""
    weightings = list(weightings)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {}
        for name, algorithm in algorithms.items():
            compute = gradient_moments(algorithm, [algorithm.weights, *weightings], tree, stacked, group_size)
            jobs[name] = pool.submit(compute)
        moments = {}
        for name, job in jobs.items():
            moments[name] = job.result()
            log_info(f"groups of {group_size}: {name}")
        return moments


def objective_gradients(tree: Tree, problem: Problem, group_size: int) -> dict[str, jax.Array]:
    """Gradients by the policy's logits of the objectives that a method may turn out to climb. [S·V] each"""
    rewards = problem.rewards
    lengths = jnp.asarray(tree.mask.sum(1))
    log_ref = jax.nn.log_softmax(problem.reference)
    log_teacher = jax.nn.log_softmax(problem.teacher)
    probs = jnp.exp(sequence_logps(tree, problem.policy))
    visits = visit_probs(tree, problem.policy)
    wins = jnp.sign(rewards[:, None] - rewards[None, :]) @ probs

    def mean_of(payoff):
        return lambda logits: jnp.exp(sequence_logps(tree, logits)) @ payoff

    def with_divergence(at_prefix):
        def objective(logits):
            penalty = visits @ at_prefix(jax.nn.log_softmax(logits)).sum(1)
            return mean_of(rewards)(logits) - BETA * penalty

        return objective

    def with_sequence_kl(logits):
        return mean_of(rewards)(logits) - BETA * sequence_kl(tree, logits, problem.reference)

    def best_of_group(logits):
        probs = jnp.exp(sequence_logps(tree, logits))
        at_most = ((rewards[None, :] <= rewards[:, None]) @ probs) ** group_size
        less = ((rewards[None, :] < rewards[:, None]) @ probs) ** group_size
        return probs / ((rewards[None, :] == rewards[:, None]) @ probs) * (at_most - less) @ rewards

    entropy_scale = ENTROPY_COEFFICIENT / BETA
    functions = {
        "J": mean_of(rewards),
        "J_β": with_sequence_kl,
        "J per token": mean_of((rewards - probs @ rewards) / lengths),
        "R per token": mean_of(rewards / lengths),
        "wins": mean_of(wins),
        "wins per token": mean_of(wins / lengths),
        "best of G": best_of_group,
        "J − β KL(π‖ref) at visits": with_divergence(lambda log_p: jnp.exp(log_p) * (log_p - log_ref)),
        "J − β KL(ref‖π) at visits": with_divergence(lambda log_p: jnp.exp(log_ref) * (log_ref - log_p)),
        "J − β KL(π‖teacher) at visits": with_divergence(lambda log_p: jnp.exp(log_p) * (log_p - log_teacher)),
        "J + c H at visits": with_divergence(lambda log_p: entropy_scale * jnp.exp(log_p) * log_p),
    }
    return {name: jax.grad(f)(problem.policy).ravel() for name, f in functions.items()}


def compare_gradients(mean, truth) -> dict[str, float]:
    """Of a mean gradient against a true one, [S·V] each.

    cosine; scale: its component along the truth; bias: its distance from the truth; bias after scaling: the same
    after dividing it by its scale. All but the cosine are relative to the truth's norm.
    """
    true_norm = jnp.linalg.norm(truth)
    norm = jnp.linalg.norm(mean)
    scale = mean @ truth / true_norm**2
    cosine = jnp.where(norm > 1e-9 * true_norm, scale * true_norm / jnp.maximum(norm, 1e-300), jnp.nan)
    bias = jnp.linalg.norm(mean - truth) / true_norm
    scaled = mean / jnp.where(scale == 0, 1.0, scale)
    bias_after_scaling = jnp.linalg.norm(scaled - truth) / true_norm
    return {
        "cosine": float(cosine),
        "scale": float(scale),
        "bias": float(bias),
        "bias after scaling": float(bias_after_scaling),
    }


def name_objective(mean, truths: Mapping[str, jax.Array]) -> str:
    """The one of `truths` whose gradient `mean` is, with its scale; – for none of them, 0 where the mean is 0."""
    if jnp.linalg.norm(mean) < EXACT * jnp.linalg.norm(truths["J"]):
        return "0"
    for name, truth in truths.items():
        comparison = compare_gradients(mean, truth)
        if comparison["cosine"] > 1 - EXACT:
            return with_factor(comparison["scale"], name)
    return "–"


def with_factor(scale: float, name: str) -> str:
    """The scale as a fraction where it is a simple one, before the objective's name."""
    fraction = Fraction(scale).limit_denominator(48)
    is_fraction = abs(float(fraction) - scale) < EXACT
    factor = str(fraction) if is_fraction else f"{scale:.3g}"
    if factor == "1":
        return name
    return f"{factor} · ({name})" if "J " in name else f"{factor} · {name}"
