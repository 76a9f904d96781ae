"""Reinforcement learning of language models: one set of estimators from the 2x3 maze to the pod.

Importing this package imports nothing else: a name is looked up in `rljax.types`, `rljax.algorithms` and the few
functions below when it is first used, so that worker processes that never touch an array do not pay for JAX. A new
algorithm is found as soon as `rljax/algorithms/__init__.py` imports it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` does it
    from rljax.algorithms import *  # noqa: F403
    from rljax.rollouts.conversations import sample_conversations as sample_conversations
    from rljax.rollouts.sampler import sample as sample
    from rljax.train.objective import policy_objective as policy_objective
    from rljax.train.trust_region import make_trust_region_update as make_trust_region_update
    from rljax.train.update import make_update as make_update
    from rljax.types import *  # noqa: F403

_PACKAGES = ("rljax.types", "rljax.algorithms")  # all of their public functions and classes
_FUNCTIONS = {
    "sample": "rljax.rollouts.sampler",
    "sample_conversations": "rljax.rollouts.conversations",
    "policy_objective": "rljax.train.objective",
    "make_trust_region_update": "rljax.train.trust_region",
    "make_update": "rljax.train.update",
}


def _public(package):
    """Names of the package's functions and classes that are its own, not those of the libraries it imports."""
    members = vars(importlib.import_module(package)).items()
    return [
        name
        for name, value in members
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "").startswith("rljax.")
    ]


def _offered():
    return sorted({*_FUNCTIONS, *(name for package in _PACKAGES for name in _public(package))})


def __dir__():
    return sorted({*globals(), *_offered()})


if not TYPE_CHECKING:  # a type checker would take every name for found

    def __getattr__(name):
        if name.startswith("_"):
            raise AttributeError(f"module 'rljax' has no attribute {name!r}")
        if name in _FUNCTIONS:
            value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        else:
            home = next((package for package in _PACKAGES if name in _public(package)), None)
            if home is None:
                raise AttributeError(f"module 'rljax' has no attribute {name!r}; it offers {', '.join(_offered())}")
            value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value
