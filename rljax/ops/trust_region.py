"""The natural-gradient step of TRPO (arXiv:1502.05477): conjugate gradients, and a line search inside a KL ball.

    x = F⁻¹ (-g)        θ' = θ + α^j √(2δ / xᵀFx) x        the first j with KL <= δ and a smaller surrogate

g is the gradient of the surrogate, F the Fisher matrix: the Hessian of the mean KL at the old policy, where
KL(old ‖ new) and KL(new ‖ old) have the same one. F is never formed: F v is the derivative of the KL's gradient along
v, forward over reverse. Parameters are one flat vector inside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from rljax.ops.kl import categorical_kl

Vector = Float[Array, " N"]
Scalar = float | Float[Array, ""]  # traced where a run is one compiled function of its hyperparameters


def directed_kl(old: Any, new: Any, kl_direction: str = "old_new", kl: Callable = categorical_kl):
    """KL(old ‖ new), as the paper has it, or KL(new ‖ old), which keeps the new policy where the old one is likely.

    Args: old, new: what kl takes: logits [.. V], or parameters of another distribution.

    Raises ValueError for another direction.
    """
    if kl_direction not in ("old_new", "new_old"):
        raise ValueError(f"kl_direction is old_new (the paper's) or new_old, not {kl_direction!r}")
    return kl(old, new) if kl_direction == "old_new" else kl(new, old)


def hessian_vector_product(f: Callable, x: Vector) -> Callable:
    """v -> H v, H the Hessian of f at x."""
    return lambda v: jax.jvp(jax.grad(f), (x,), (v,))[1]


def conjugate_gradient(
    product: Callable, b: Vector, iterations: int = 10, tolerance: float = 1e-10
) -> tuple[Vector, Vector]:
    """(x, b - A x) with A x ≈ b, A positive definite and known by product(v) = A v; begins at 0.

    Stops early where |A x - b|² <= tolerance · |b|².
    """

    def unfinished(state):
        n, _, _, _, square = state
        return (n < iterations) & (square > tolerance * (b @ b))

    def one(state):
        n, x, residual, direction, square = state
        along = product(direction)
        step = square / (direction @ along)
        x, residual = x + step * direction, residual - step * along
        new = residual @ residual
        return n + 1, x, residual, residual + new / square * direction, new

    return jax.lax.while_loop(unfinished, one, (0, jnp.zeros_like(b), b, b, b @ b))[1:3]


class NaturalGradientStep(NamedTuple):
    """A step from the parameters, flat, and by how much the surrogate should fall along it, to first order."""

    change: Vector
    expected: Float[Array, ""]


def natural_gradient_step(
    kl: Callable, params: Any, gradient: Any, delta: Scalar = 0.01, damping: Scalar = 0.1, iterations: int = 10
) -> NaturalGradientStep:
    """√(2δ / xᵀHx) x with H x = -g, H = F + damping · 1: as far as a KL of δ goes where the KL is its second order.

    Args: kl: params -> mean KL to the policy at `params`. gradient: of the surrogate there, which is to fall.
    Damping shortens the step. Parameters that neither see (a critic's, where nothing is shared) do not move.
    """
    theta, unflatten = ravel_pytree(params)
    g = ravel_pytree(gradient)[0]
    fisher = hessian_vector_product(lambda flat: kl(unflatten(flat)), theta)
    damped = lambda v: fisher(v) + damping * v  # noqa: E731
    x, residual = conjugate_gradient(damped, -g, iterations)
    change = jnp.sqrt(2.0 * delta / (x @ (-g - residual) + 1e-8)) * x  # H x without another product
    return NaturalGradientStep(change, -(g @ change))


class LineSearchResult(NamedTuple):
    """Where a line search ended. Not accepted: `params` are those it began with, to the bit; kl and improvement 0."""

    params: Any
    accepted: Float[Array, ""]  # 1 or 0
    trials: Float[Array, ""]  # candidates tried
    kl: Float[Array, ""]  # of the accepted one
    improvement: Float[Array, ""]  # by how much the surrogate fell


def line_search(
    measure: Callable,
    params: Any,
    before: Float[Array, ""],
    change: Vector,
    delta: Scalar = 0.01,
    shrink: float = 0.8,
    trials: int = 10,
) -> LineSearchResult:
    """The first of θ + shrink^j · change, j = 0 .. trials - 1, with a KL <= delta and a surrogate below `before`.

    Args: measure: params -> (surrogate, KL). before: the surrogate at θ. What is not a number is not accepted.
    """
    theta, unflatten = ravel_pytree(params)

    def searching(state):
        n, accepted, *_ = state
        return ~accepted & (n < trials)

    def one(state):
        n, *_ = state
        after, distance = measure(candidate(n))
        return n + 1, (distance <= delta) & (after < before), distance, before - after

    candidate = lambda n: unflatten(theta + shrink ** n.astype(theta.dtype) * change)  # noqa: E731
    start = (jnp.int32(0), jnp.array(False), jnp.zeros_like(before), jnp.zeros_like(before))
    n, accepted, distance, fell = jax.lax.while_loop(searching, one, start)
    new = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), candidate(n - 1), params)
    distance, fell = (jnp.where(accepted, x, 0.0) for x in (distance, fell))
    return LineSearchResult(new, accepted.astype(before.dtype), n.astype(before.dtype), distance, fell)
