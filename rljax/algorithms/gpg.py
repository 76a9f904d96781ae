"""GPG: group policy gradient (arXiv:2504.02546).

    Â_i = α (R_i - mean_group R)        α = groups / groups whose rewards differ        L = token mean of -Â log π

Groups of equal rewards add nothing to the gradient but count in its divisor: α makes up for them. No ratio, no clip, no
KL, no division by a deviation.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import from_rewards
from rljax.algorithms.reinforce import reinforce
from rljax.ops import groups
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def gpg() -> Algorithm:
    """GPG."""

    def advantage(rewards, group, valid):
        share = jnp.where(valid, 1.0 / jnp.maximum(groups.group_count(group, valid), 1.0), 0.0)
        informative = jnp.where(groups.zero_std(rewards, group, valid), 0.0, share)
        alpha = share.sum() / jnp.maximum(informative.sum(), 1.0)
        return alpha * groups.center(rewards, group, valid)

    return reinforce()._replace(credit=from_rewards(advantage, "group"), weights=token_mean)
