"""The critic-free algorithms by name, for scripts that take one by one word: `--algorithm rloo`."""

from collections.abc import Callable
from typing import Literal

from rljax import algorithms as a
from rljax.types import Algorithm

_CRITIC_FREE = (a.grpo, a.dapo, a.gspo, a.gspo_token, a.cispo, a.sapo, a.gmpo, a.luspo, a.lite_ppo, a.gpg, a.maxrl)
_CRITIC_FREE += (a.gdpo, a.rloo, a.remax, a.reinforce, a.reinforce_to_go, a.reinforce_pp, a.reinforce_pp_baseline)
_CRITIC_FREE += (a.opo, a.otb, a.opmd, a.dro, a.topr, a.vespo, a.real, a.fipo, a.dppo_tv, a.dppo_kl, a.clip_cov)
_CRITIC_FREE += (a.kl_cov, a.w_reinforce, a.psr, a.nsr, a.raft, a.rft, a.grpo_pass_at_k, a.pass_at_k_training)

CRITIC_FREE: dict[str, Callable[[], Algorithm]] = {make.__name__: make for make in _CRITIC_FREE}
OF_LENGTH = {"dr_grpo": a.dr_grpo}  # the loss is divided by the longest completion that can be sampled
CriticFree = Literal[(*CRITIC_FREE, *OF_LENGTH)]


def critic_free(name: CriticFree, max_tokens: int) -> Algorithm:
    """The algorithm with its paper's settings. `max_tokens`: of the longest completion that can be sampled."""
    return OF_LENGTH[name](float(max_tokens)) if name in OF_LENGTH else CRITIC_FREE[name]()
