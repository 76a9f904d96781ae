"""CISPO: clipped importance weights, gradients from every token (MiniMax-M1, arXiv:2506.13585, eq. 4).

    L = -(1/Σm) Σ sg(clip(ρ, ratio_min, ratio_max)) Â log π

PPO's clip drops the gradient of clipped tokens; here the weight is clipped and the token stays. Bounds are ratios, not
distances from 1: the paper has no lower one, ScaleRL (arXiv:2510.13786) recommends an upper one of 4 to 8. The value of
the loss has no meaning. Â is GRPO's. The clip removes no gradient: the share of clipped weights is
`weight_clip_fraction`.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import importance_ratio
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def cispo(ratio_min: float = 0.0, ratio_max: float = 5.0) -> Algorithm:
    """CISPO."""

    def loss(output, batch):
        ratio = stop_gradient(importance_ratio(output.logp, old_policy_logp(batch.traj)))
        weight = jnp.clip(ratio, ratio_min, ratio_max)
        return -weight * batch.advantages * output.logp, {"weight_clip_fraction": (weight != ratio).astype(ratio.dtype)}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean, group_signal=rewards_differ, least_group=2)
