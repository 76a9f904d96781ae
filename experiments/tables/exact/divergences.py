"""The means of the estimators of KL(π ‖ π_ref), and of their gradients as terms of a loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from experiments.tables.exact.language import Tree, sequence_kl, sequence_logps, token_logps, visit_probs
from experiments.tables.exact.markdown import markdown_table
from experiments.tables.exact.problems import Problem
from rljax.ops import kl

ON_POLICY = (kl.k1, kl.absolute, kl.k2, kl.k3, kl.k1_with_k2_gradient, kl.k3_with_k2_gradient)
IMPORTANCE_WEIGHTED = (kl.importance_weighted_k1, kl.importance_weighted_k2, kl.importance_weighted_k3)


def without_behavior(estimator: Callable) -> Callable:
    return lambda logp, ref_logp, behavior_logp: estimator(logp, ref_logp)


def sum_to_go(x):
    """Sum over this and later tokens. [N T]"""
    return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]


def prefix_ratio_k3(logp, ref_logp, behavior_logp):
    ratio = jnp.exp(jnp.cumsum(logp - behavior_logp, axis=1))
    return ratio * kl.k3(logp, ref_logp)


def k1_in_reward_of_token(logp, ref_logp, behavior_logp):
    return stop_gradient(kl.k1(logp, ref_logp)) * logp


def k1_in_reward_to_go(logp, ref_logp, behavior_logp):
    return stop_gradient(sum_to_go(kl.k1(logp, ref_logp))) * logp


# (log π, log π_ref, log π_behavior), [N T] each, 0 after the end -> [N T]. Only log π is differentiated.
ESTIMATORS: dict[str, Callable] = {
    **{estimator.__name__: without_behavior(estimator) for estimator in ON_POLICY},
    **{estimator.__name__: estimator for estimator in IMPORTANCE_WEIGHTED},
    "k3 · ratio of the completion so far": prefix_ratio_k3,
    "k1 in the reward, own token's": k1_in_reward_of_token,
    "k1 in the reward, this and later tokens'": k1_in_reward_to_go,
}
FORWARD_SEQUENCE = "KL(π‖ref) of completions"
FORWARD_VISITS = "KL(π‖ref) at visits"
REVERSE_VISITS = "KL(ref‖π) at visits"


def kl_targets(tree: Tree, problem: Problem) -> dict[str, Callable]:
    """Name -> (logits) -> nats: the exact divergences.

    At visits: summed over the prefixes that the behavior policy visits, held fixed.
    """
    visits = visit_probs(tree, problem.behavior)
    log_ref = jax.nn.log_softmax(problem.reference)

    def forward_at_visits(logits):
        log_p = jax.nn.log_softmax(logits)
        return visits @ (jnp.exp(log_p) * (log_p - log_ref)).sum(1)

    def reverse_at_visits(logits):
        return visits @ (jnp.exp(log_ref) * (log_ref - jax.nn.log_softmax(logits))).sum(1)

    def of_sequences(logits):
        return sequence_kl(tree, logits, problem.reference)

    return {FORWARD_SEQUENCE: of_sequences, FORWARD_VISITS: forward_at_visits, REVERSE_VISITS: reverse_at_visits}


def measure_kl_estimators(tree: Tree, problem: Problem) -> dict[str, dict[str, float]]:
    """For each estimator its mean divided by KL(π‖ref), and ‖E g − ∇target‖ / ‖∇target‖ for each target."""
    probs = jnp.exp(sequence_logps(tree, problem.behavior))
    behavior_logp = token_logps(tree, problem.behavior)
    ref_logp = token_logps(tree, problem.reference)
    true = {name: jax.value_and_grad(f)(problem.policy) for name, f in kl_targets(tree, problem).items()}
    rows = {}
    for name, estimator in ESTIMATORS.items():

        def mean_estimate(logits, estimator=estimator):
            return probs @ estimator(token_logps(tree, logits), ref_logp, behavior_logp).sum(1)

        mean, mean_gradient = jax.value_and_grad(mean_estimate)(problem.policy)
        if "reward" in name:  # the value is that of k1, and the term only a score function's
            mean = jnp.nan
        row = {f"value / {target}": float(mean / true[target][0]) for target in (FORWARD_SEQUENCE, FORWARD_VISITS)}
        for target, (_, gradient) in true.items():
            error = jnp.linalg.norm(mean_gradient - gradient) / jnp.linalg.norm(gradient)
            row[f"∇ {target}"] = float(error)
        rows[name] = row
    return rows


def kl_table(tree: Tree, on_policy: Problem, off_policy: Problem) -> str:
    """The estimators' means and gradients, on-policy and off-policy."""
    on = measure_kl_estimators(tree, on_policy)
    off = measure_kl_estimators(tree, off_policy)
    one_token = tree.mask.shape[1] == 1  # completions and visits are then the same
    rows = []
    for name in on:
        row = {"estimator": name}
        for column in on[name]:
            if one_token and "completions" in column:
                continue
            title = column.replace(" at visits", "") if one_token else column
            row[f"{title}, on-policy"] = on[name][column]
            row[f"{title}, off-policy"] = off[name][column]
        rows.append(row)
    return markdown_table(rows)
