"""Compilations are counted by function and shape, wherever the program comes from."""

import jax
import jax.numpy as jnp

from tests.compilations import count_compilations


def doubled():
    """A jitted function of its own, whose program is always the same."""

    @jax.jit
    def twice(x):
        return x + x

    return twice


def test_each_shape_of_each_function_counts_once():
    """The program of the second function is in the persistent cache, if there is one."""
    for _ in range(2):
        twice = doubled()
        with count_compilations() as compiled:
            for rows in (2, 3, 2, 3):
                twice(jnp.ones(rows))
        assert compiled["twice"] == 2
    with count_compilations() as compiled:
        twice(jnp.ones(2))
    assert compiled["twice"] == 0
