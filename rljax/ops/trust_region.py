"""The natural-gradient step of TRPO (arXiv:1502.05477): conjugate gradients, then a line search within a KL bound.

    x = F⁻¹ (-g)        θ' = θ + α^j √(2δ / xᵀFx) x        the first j with KL <= δ and a smaller surrogate

g is the gradient of the surrogate, F the Fisher matrix: the Hessian of the mean KL at the old policy, which
is the same for KL(old ‖ new) and KL(new ‖ old). F is never formed: F v is the derivative of the KL's gradient along
v, forward over reverse. Parameters are one flat vector inside, float32 or wider; a candidate has their own dtype again.
The step does not depend on the scale of the surrogate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from rljax.ops.dtypes import at_least_float32, cast_like
from rljax.ops.kl import categorical_kl
from rljax.ops.shapes import Scalar

Vector = Float[Array, " N"]
Distribution = Any  # logits [.. V], or parameters of another distribution
Divergence = Callable[[Distribution, Distribution], Array]  # (p, q) -> KL(p ‖ q)


def directed_kl(
    old: Distribution, new: Distribution, kl_direction: str = "old_new", kl: Divergence = categorical_kl
) -> Array:
    """KL(old ‖ new), as in the paper, or KL(new ‖ old), which keeps the new policy where the old one is likely.

    Raises ValueError for another direction.
    """
    if kl_direction not in ("old_new", "new_old"):
        raise ValueError(f"kl_direction is old_new (the paper's) or new_old, not {kl_direction!r}")
    return kl(old, new) if kl_direction == "old_new" else kl(new, old)


def hessian_vector_product(f: Callable[[Vector], Array], x: Vector) -> Callable[[Vector], Vector]:
    """v -> H v, H the Hessian of f at x."""
    return lambda v: jax.jvp(jax.grad(f), (x,), (v,))[1]


def conjugate_gradient(
    product: Callable[[Vector], Vector], b: Vector, iterations: int = 10, tolerance: float = 1e-10
) -> tuple[Vector, Vector]:
    """(x, b - A x) with A x ≈ b, A positive definite, given by product(v) = A v; starts at 0.

    Stops early where |A x - b|² <= tolerance · |b|².
    """

    def unfinished(state):
        n, _, _, _, square = state
        return (n < iterations) & (square > tolerance * (b @ b))

    def iterate(state):
        n, x, residual, direction, square = state
        along = product(direction)
        step = square / (direction @ along)
        x = x + step * direction
        residual = residual - step * along
        new = residual @ residual
        return n + 1, x, residual, residual + new / square * direction, new

    return jax.lax.while_loop(unfinished, iterate, (0, jnp.zeros_like(b), b, b, b @ b))[1:3]


class NaturalGradientStep(NamedTuple):
    """A step from the parameters, flat, and the decrease of the surrogate along it to first order."""

    change: Vector
    expected_improvement: Float[Array, ""]


def natural_gradient_step(
    kl: Callable[[Any], Array],
    params: Any,
    gradient: Any,
    delta: Scalar = 0.01,
    damping: Scalar = 0.1,
    iterations: int = 10,
) -> NaturalGradientStep:
    """√(2δ / xᵀHx) x with H x = -g, H = F + damping · 1: the length at which the KL, to second order, is δ.

    Args: kl: params -> mean KL to the policy at `params`. gradient: of the surrogate there, to be minimized.
    The gradient's scale cancels; without a gradient the step is 0. Damping shortens the step. Parameters on which
    neither depends (those of a separate critic) do not move.
    """
    theta, unflatten = ravel_pytree(at_least_float32(params))
    g = ravel_pytree(at_least_float32(gradient))[0]
    largest = jnp.abs(g).max()
    size = jnp.where(largest > 0, largest, 1.0)
    downhill = -g / size  # so that its square neither vanishes nor overflows
    fisher = hessian_vector_product(lambda flat: kl(unflatten(flat)), theta)

    def damped(v):
        return fisher(v) + damping * v

    x, residual = conjugate_gradient(damped, downhill, iterations)
    curvature = x @ (downhill - residual)  # xᵀHx: H x = downhill - residual, without another product
    length = jnp.where(curvature > 0, jnp.sqrt(2.0 * delta / jnp.where(curvature > 0, curvature, 1.0)), 0.0)
    change = length * x
    return NaturalGradientStep(change, -(g @ change))


class LineSearchResult(NamedTuple):
    """Result of a line search. Not accepted: `params` are the initial ones, bit for bit, and kl and improvement 0."""

    params: Any
    accepted: Float[Array, ""]  # 1 or 0
    trials: Float[Array, ""]  # candidates tried
    kl: Float[Array, ""]  # of the accepted one
    improvement: Float[Array, ""]  # decrease of the surrogate


def line_search(
    evaluate: Callable[[Any], tuple[Array, Array]],
    params: Any,
    before: Float[Array, ""],
    change: Vector,
    delta: Scalar = 0.01,
    shrink: float = 0.8,
    trials: int = 10,
) -> LineSearchResult:
    """The first of θ + shrink^j · change, j = 0 .. trials - 1, with a KL <= delta and a surrogate below `before`.

    Args: evaluate: params -> (surrogate, KL). before: the surrogate at θ. NaN is not accepted.
    """
    theta, unflatten = ravel_pytree(at_least_float32(params))

    def searching(state):
        n, accepted, *_ = state
        return ~accepted & (n < trials)

    def candidate(n):
        return cast_like(unflatten(theta + shrink ** n.astype(theta.dtype) * change), params)

    def try_candidate(state):
        n, *_ = state
        after, distance = evaluate(candidate(n))
        return n + 1, (distance <= delta) & (after < before), distance, before - after

    start = (jnp.int32(0), jnp.array(False), jnp.zeros_like(before), jnp.zeros_like(before))
    n, accepted, distance, improvement = jax.lax.while_loop(searching, try_candidate, start)
    new = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), candidate(n - 1), params)
    return LineSearchResult(
        params=new,
        accepted=accepted.astype(before.dtype),
        trials=n.astype(before.dtype),
        kl=jnp.where(accepted, distance, 0.0),
        improvement=jnp.where(accepted, improvement, 0.0),
    )
