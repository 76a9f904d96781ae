"""Acrobot-v1: swing the tip of a two-link pendulum above a line by a torque at its elbow (Sutton 1996).

Equations and constants are gym's (its "book" version): links of length and mass 1, one Runge-Kutta step of 0.2 s. The
reward is -1 a step, 0 for the step that reaches the line, which terminates the episode; truncated after 500 steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step

DT = 0.2  # seconds a step
GRAVITY = 9.8
MAX_VELOCITY = (4 * jnp.pi, 9 * jnp.pi)  # of the two joints, radians a second


class Acrobot(NamedTuple):
    """Parameters."""

    max_steps: int = 500  # an episode is truncated after


class State(NamedTuple):
    physics: jax.Array  # two angles, two angular velocities
    time: jax.Array  # steps so far


def make_acrobot(**params) -> Env:
    """Acrobot as an Env that observes cosine and sine of both angles, and both velocities. Actions: torque -1, 0, 1.

    params: fields of `Acrobot`.
    """
    return Env(reset, step, 3, Acrobot(**params))


def _observe(physics):
    a, b, *velocities = physics
    return jnp.stack([jnp.cos(a), jnp.sin(a), jnp.cos(b), jnp.sin(b), *velocities])


def reset(key: jax.Array, params: Acrobot) -> tuple[jax.Array, State]:
    physics = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    return _observe(physics), State(physics, jnp.int32(0))


def _derivatives(physics, torque):
    """Time derivatives of angles and velocities; each link: mass 1, center of mass at 0.5, moment of inertia 1."""
    a, b, va, vb = physics
    d1 = 0.25 + (1.25 + jnp.cos(b)) + 2.0
    d2 = 0.25 + 0.5 * jnp.cos(b) + 1.0
    phi2 = 0.5 * GRAVITY * jnp.cos(a + b - jnp.pi / 2)
    phi1 = -0.5 * vb * jnp.sin(b) * (vb + 2.0 * va) + 1.5 * GRAVITY * jnp.cos(a - jnp.pi / 2) + phi2
    second = (torque + d2 / d1 * phi1 - 0.5 * va**2 * jnp.sin(b) - phi2) / (1.25 - d2**2 / d1)
    return jnp.stack([va, vb, -(d2 * second + phi1) / d1, second])


def step(key: jax.Array, state: State, action: jax.Array, params: Acrobot) -> Step:
    def runge_kutta_stage(carry, fraction):  # a scan compiles one stage, not four
        slope = _derivatives(state.physics + fraction * DT * carry, action - 1.0)
        return slope, slope

    fractions = jnp.array([0.0, 0.5, 0.5, 1.0])
    _, slopes = jax.lax.scan(runge_kutta_stage, jnp.zeros(4), fractions)
    a, b, va, vb = state.physics + DT / 6.0 * (jnp.array([1.0, 2.0, 2.0, 1.0]) @ slopes)
    a = _wrap_angle(a)
    b = _wrap_angle(b)
    va = jnp.clip(va, -MAX_VELOCITY[0], MAX_VELOCITY[0])
    vb = jnp.clip(vb, -MAX_VELOCITY[1], MAX_VELOCITY[1])
    physics = jnp.stack([a, b, va, vb])
    new = State(physics, state.time + 1)
    terminated = -jnp.cos(a) - jnp.cos(a + b) > 1.0
    truncated = ~terminated & (new.time >= params.max_steps)
    return Step(_observe(physics), new, jnp.where(terminated, 0.0, -1.0), terminated, truncated, {})


def _wrap_angle(angle):
    """The same angle in [-π, π)."""
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
