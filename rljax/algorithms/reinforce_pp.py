"""REINFORCE++: PPO's tricks without its critic (arXiv:2501.03262).

    Â = whiten(Σ_{t'≥t} γ^{t'-t} r_t')    over all decisions of the batch; no group is needed
    L = (1/Σm) Σ max(-ρÂ, -clip(ρ) Â)

A row is one episode: its sum of rewards goes on to the end of the row.

The paper's KL is in the reward: `kl_in_reward(reinforce_pp(), β)`. `reinforce_pp_baseline` subtracts the mean reward of
the group before whitening (several completions per prompt); its KL is k2 in the loss:
`with_kl(reinforce_pp_baseline(), β, k2)`.
"""

from rljax.algorithms.common.credit import decision_rewards, from_rewards
from rljax.algorithms.dapo import dapo
from rljax.ops import groups
from rljax.ops.returns import discounted_returns
from rljax.ops.statistics import whiten
from rljax.types import Algorithm, Batch


def reinforce_pp(low: float = 0.2, high: float = 0.2, gamma: float = 1.0) -> Algorithm:
    """REINFORCE++."""

    def credit(traj, coefficients):
        rewards, mask = decision_rewards(traj)
        returns = discounted_returns(rewards, mask, gamma)
        return Batch(traj, whiten(returns, mask), mask, returns=returns, coefficients=coefficients)

    return dapo(low, high)._replace(credit=credit, group_signal=None, least_group=1)


def reinforce_pp_baseline(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """REINFORCE++ with the group's mean reward as baseline."""
    centered = from_rewards(groups.center, "group")

    def credit(traj, coefficients):
        batch = centered(traj, coefficients)
        return batch.replace(advantages=whiten(batch.advantages, batch.mask))

    return dapo(low, high)._replace(credit=credit)
