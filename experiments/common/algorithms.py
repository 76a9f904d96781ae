"""The critic-free algorithms by name, for scripts that take one by one word: `--algorithm rloo`."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from rljax import algorithms as a
from rljax.types import Algorithm


def critic_free(max_tokens: int) -> dict[str, Callable[[], Algorithm]]:
    """name -> function that makes the algorithm with its paper's settings.

    `max_tokens`: of the longest completion that can be sampled.
    """
    makers = (a.grpo, a.dapo, a.gspo, a.gspo_token, a.cispo, a.sapo, a.gmpo, a.luspo, a.lite_ppo, a.gpg, a.maxrl)
    makers += (a.gdpo, a.rloo, a.remax, a.reinforce, a.reinforce_to_go, a.reinforce_pp, a.reinforce_pp_baseline)
    makers += (a.opo, a.otb, a.opmd, a.dro, a.topr, a.vespo, a.real, a.fipo, a.dppo_tv, a.dppo_kl, a.clip_cov)
    makers += (a.kl_cov, a.w_reinforce, a.psr, a.nsr, a.raft, a.rft, a.grpo_pass_at_k, a.pass_at_k_training)
    return {make.__name__: make for make in makers} | {"dr_grpo": partial(a.dr_grpo, float(max_tokens))}


PER_STEP = {"grpo_process": a.grpo_process}  # learn from rewards where steps end
CriticFree = Literal[tuple(critic_free(max_tokens=1) | PER_STEP)]
