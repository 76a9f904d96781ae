"""One paper, one file, one function that returns an Algorithm. `wrap` changes an Algorithm into another."""

from rljax.algorithms.grpo import grpo
from rljax.algorithms.ppo import ppo
from rljax.algorithms.reinforce import reinforce
from rljax.algorithms.sft import sft
from rljax.algorithms.wrap import with_entropy, with_importance_weighted_kl, with_kl

__all__ = ["grpo", "ppo", "reinforce", "sft", "with_entropy", "with_importance_weighted_kl", "with_kl"]
