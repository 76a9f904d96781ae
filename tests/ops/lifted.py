"""For tests that hand float64 numpy arrays to a module of rljax.ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Lifted:
    """The module, its functions fed with jax arrays made of numpy ones."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def lifted(*args, **keywords):
            return function(*(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args), **keywords)

        return lifted


@pytest.fixture(autouse=True)
def float64():
    """Of every test in a module that imports it."""
    with jax.enable_x64(True):
        yield


def close(got, want, rtol=1e-10):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-12)
