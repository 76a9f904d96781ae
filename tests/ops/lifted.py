"""For tests that hand numpy arrays to a module of rljax.ops."""

import jax.numpy as jnp
import numpy as np


class Lifted:
    """The module, its functions fed with jax arrays made of numpy ones."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def lifted(*args, **keywords):
            return function(*(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args), **keywords)

        return lifted
