"""Reinforcement learning of language models: one set of estimators from the 2x3 maze to the pod.

Importing this package imports nothing else: a name is looked up when it is first used, so that worker processes which
never touch an array do not pay for JAX.
"""

import importlib

_HOME = {
    "grpo": "rljax.algorithms",
    "ppo": "rljax.algorithms",
    "reinforce": "rljax.algorithms",
    "sft": "rljax.algorithms",
    "with_entropy": "rljax.algorithms",
    "with_kl": "rljax.algorithms",
    "make_update": "rljax.train.update",
    "policy_objective": "rljax.train.objective",
    "sample": "rljax.rollouts.tokens",
    "Algorithm": "rljax.types",
    "Batch": "rljax.types",
    "LM": "rljax.types",
    "Objective": "rljax.types",
    "PolicyOutput": "rljax.types",
    "Rows": "rljax.types",
    "Sampling": "rljax.types",
    "TrainState": "rljax.types",
    "Trajectory": "rljax.types",
    "Transition": "rljax.types",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'rljax' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
