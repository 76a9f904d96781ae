"""Reinforcement learning of language models: one set of estimators from the 2x3 maze to the pod.

Importing this package imports nothing else: a name is looked up when it is first used, so that worker processes which
never touch an array do not pay for JAX.
"""

import importlib

_HOME = {
    "a_star_po": "rljax.algorithms",
    "aot": "rljax.algorithms",
    "aot_unpaired": "rljax.algorithms",
    "bco": "rljax.algorithms",
    "capo": "rljax.algorithms",
    "cispo": "rljax.algorithms",
    "clip_cov": "rljax.algorithms",
    "cpo": "rljax.algorithms",
    "dapo": "rljax.algorithms",
    "dft": "rljax.algorithms",
    "distill": "rljax.algorithms",
    "dpo": "rljax.algorithms",
    "dppo_kl": "rljax.algorithms",
    "dppo_tv": "rljax.algorithms",
    "dqn": "rljax.algorithms",
    "dr_grpo": "rljax.algorithms",
    "dro": "rljax.algorithms",
    "off_policy_sequence_mask": "rljax.algorithms",
    "filter_overlong": "rljax.algorithms",
    "fipo": "rljax.algorithms",
    "gdpo": "rljax.algorithms",
    "gmpo": "rljax.algorithms",
    "gpg": "rljax.algorithms",
    "grpo": "rljax.algorithms",
    "grpo_process": "rljax.algorithms",
    "gspo": "rljax.algorithms",
    "gspo_token": "rljax.algorithms",
    "kl_cov": "rljax.algorithms",
    "kl_in_reward": "rljax.algorithms",
    "kto": "rljax.algorithms",
    "lite_ppo": "rljax.algorithms",
    "luspo": "rljax.algorithms",
    "mask_is": "rljax.algorithms",
    "maxrl": "rljax.algorithms",
    "normalized_is": "rljax.algorithms",
    "off_policy_pg": "rljax.algorithms",
    "online_pairs": "rljax.algorithms",
    "high_entropy_mask": "rljax.algorithms",
    "opo": "rljax.algorithms",
    "orpo": "rljax.algorithms",
    "otb": "rljax.algorithms",
    "pass_at_k": "rljax.algorithms",
    "overlong_penalty": "rljax.algorithms",
    "ppo": "rljax.algorithms",
    "ppo_penalty": "rljax.algorithms",
    "process_reward_model": "rljax.algorithms",
    "ranked_reward_model": "rljax.algorithms",
    "real": "rljax.algorithms",
    "reinforce": "rljax.algorithms",
    "reinforce_ada": "rljax.algorithms",
    "reinforce_pp": "rljax.algorithms",
    "reinforce_pp_baseline": "rljax.algorithms",
    "reinforce_to_go": "rljax.algorithms",
    "reject": "rljax.algorithms",
    "remax": "rljax.algorithms",
    "reward_model": "rljax.algorithms",
    "rloo": "rljax.algorithms",
    "sapo": "rljax.algorithms",
    "sft": "rljax.algorithms",
    "simpo": "rljax.algorithms",
    "trpo": "rljax.algorithms",
    "trpo_gae": "rljax.algorithms",
    "truncate_is": "rljax.algorithms",
    "vapo": "rljax.algorithms",
    "vespo": "rljax.algorithms",
    "vine_ppo": "rljax.algorithms",
    "vpg": "rljax.algorithms",
    "vtrace": "rljax.algorithms",
    "with_entropy": "rljax.algorithms",
    "with_importance_weighted_kl": "rljax.algorithms",
    "with_kl": "rljax.algorithms",
    "with_positive_nll": "rljax.algorithms",
    "make_trust_region_update": "rljax.train.trust_region",
    "make_update": "rljax.train.update",
    "policy_objective": "rljax.train.objective",
    "sample": "rljax.rollouts.sampler",
    "Algorithm": "rljax.types",
    "Batch": "rljax.types",
    "Unpaired": "rljax.types",
    "LM": "rljax.types",
    "Objective": "rljax.types",
    "Pairs": "rljax.types",
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
