"""GSPO: one ratio per completion (arXiv:2507.18071).

    s_i = exp((1/n_i) Σ_t log ρ_it)        L = (1/N⁺) Σ_i max(-s_i Â_i, -clip(s_i, 1 - low, 1 + high) Â_i)

Rewards are of whole completions, so the ratio is one of whole completions too, comparable over lengths by the geometric
mean. `gspo_token` (eq. 14) has the same value and, for advantages that are constant in a row, the same gradient:

    s_it = sg(s_i) π_it / sg(π_it)

It allows advantages that differ from token to token. Â is GRPO's.
"""

from collections.abc import Callable

from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops import losses
from rljax.ops.ratios import bounded_exp, sequence_geometric_mean
from rljax.ops.shapes import PerToken
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm, Batch, PolicyOutput


def _gspo(log_ratio: Callable[[PolicyOutput, Batch], PerToken], low: float, high: float) -> Algorithm:
    def loss(output, batch):
        ratio = bounded_exp(log_ratio(output, batch))
        terms = losses.clipped_surrogate(ratio, batch.advantages, low, high)
        return terms, losses.clip_metrics(ratio, batch.advantages, low, high)

    return Algorithm(
        credit=group_relative(), loss=loss, weights=seq_mean_token_mean, group_signal=rewards_differ, least_group=2
    )


def _sequence_log_ratio(output: PolicyOutput, batch: Batch) -> PerToken:
    return sequence_geometric_mean(output.logp - old_policy_logp(batch.traj), batch.mask, batch.traj.segments)


def gspo(low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    """GSPO. The clip is far narrower than for tokens: geometric means hardly move."""
    return _gspo(_sequence_log_ratio, low, high)


def gspo_token(low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    """GSPO-token."""

    def log_ratio(output, batch):
        return stop_gradient(_sequence_log_ratio(output, batch) - output.logp) + output.logp

    return _gspo(log_ratio, low, high)
