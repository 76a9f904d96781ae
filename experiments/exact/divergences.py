"""What the estimators of KL(π ‖ π_ref) average to, and what their gradients do when they stand in a loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from exact.language import Tree, chosen, log_prob, sequence_kl, visits
from exact.worlds import World
from rljax.ops import kl

ON_POLICY = (kl.k1, kl.absolute, kl.k2, kl.k3, kl.k1_with_k2_gradient, kl.k3_with_k2_gradient)
WEIGHTED = (kl.importance_weighted_k1, kl.importance_weighted_k2, kl.importance_weighted_k3)


def to_go(x):
    """Σ over this and later tokens."""
    return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]


# (log π, log π_ref, log behaviour), [N T] each, 0 after the end -> [N T]. Only log π is differentiated.
ESTIMATORS: dict[str, Callable] = {
    **{f.__name__: lambda p, q, mu, f=f: f(p, q) for f in ON_POLICY},
    **{f.__name__: f for f in WEIGHTED},
    "k3 · ratio of the answer so far": lambda p, q, mu: jnp.exp(jnp.cumsum(p - mu, axis=1)) * kl.k3(p, q),
    "k1 in the reward, own token's": lambda p, q, mu: stop_gradient(kl.k1(p, q)) * p,
    "k1 in the reward, this and later tokens'": lambda p, q, mu: stop_gradient(to_go(kl.k1(p, q))) * p,
}


def targets(lm: Tree, world: World) -> dict[str, Callable]:
    """table -> nats: what is meant. At visits: Σ over the prefixes that the behaviour policy visits, held fixed."""
    d, log_ref = visits(lm, world.behaviour), jax.nn.log_softmax(world.reference)

    def forward(table):
        log_p = jax.nn.log_softmax(table)
        return d @ (jnp.exp(log_p) * (log_p - log_ref)).sum(1)

    def reverse(table):
        return d @ (jnp.exp(log_ref) * (log_ref - jax.nn.log_softmax(table))).sum(1)

    def answers(table):
        return sequence_kl(lm, table, world.reference)

    return {"KL(π‖ref) of answers": answers, "KL(π‖ref) at visits": forward, "KL(ref‖π) at visits": reverse}


def distances(lm: Tree, world: World) -> dict[str, dict[str, float]]:
    """For each estimator its mean value over KL(π‖ref) of answers and at visits; and ‖E g - ∇target‖/‖∇target‖."""
    P, mu, ref = (jnp.exp(log_prob(lm, world.behaviour)), *(chosen(lm, t) for t in (world.behaviour, world.reference)))
    true = {name: jax.value_and_grad(f)(world.policy) for name, f in targets(lm, world).items()}
    rows = {}
    for name, estimator in ESTIMATORS.items():
        averaged = lambda table, f=estimator: P @ f(chosen(lm, table), ref, mu).sum(1)  # noqa: E731
        mean, slope = jax.value_and_grad(averaged)(world.policy)
        mean = jnp.nan if "reward" in name else mean  # there the value is that of k1; the term is a score function's
        value = {f"value / {k}": float(mean / true[k][0]) for k in ("KL(π‖ref) of answers", "KL(π‖ref) at visits")}
        off = {f"∇ {k}": float(jnp.linalg.norm(slope - g) / jnp.linalg.norm(g)) for k, (_, g) in true.items()}
        rows[name] = value | off
    return rows
