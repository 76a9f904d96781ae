"""Reward models: a head that scores a whole completion, or each step of one (process reward model).

Both read the hidden state *after* the token they judge, whereas a value reads the one before its decision. The state
after a completion's last token is in no column of a Trajectory, whose T decisions are between T + 1 tokens, so the
tokens are put together again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.policy import apply_head
from rljax.types import Params, ScoreFn, Trajectory


def with_score_head(params: Params, config: DecoderConfig, key: Array) -> Params:
    """Adds "score_head" [D], normal with standard deviation 1/√(D + 1) (arXiv:2009.01325)."""
    scale = (config.hidden_size + 1) ** -0.5
    return {**params, "score_head": jax.random.normal(key, (config.hidden_size,)) * scale}


def make_reward_model(config: DecoderConfig) -> ScoreFn:
    """score(params, frozen, trajectory) -> [B]: the score at the last token of each row's completion.

    NaN for a row without a completion, whose mask is empty.
    """
    step_scores = make_process_reward_model(config)

    def score(params: Params, frozen: Params, traj: Trajectory) -> Float[Array, "B"]:
        T = traj.mask.shape[1]
        last = T - 1 - jnp.argmax(traj.mask[:, ::-1], axis=1)
        at_last = jnp.take_along_axis(step_scores(params, frozen, traj), last[:, None], axis=1)[:, 0]
        with jax.debug_nans(False):  # this NaN is meant
            return jnp.where(traj.mask.any(axis=1), at_last, jnp.nan)

    return score


def make_process_reward_model(config: DecoderConfig) -> ScoreFn:
    """step_scores(params, frozen, trajectory) -> [B T]: the head's output (a logit) after each decision's token."""

    def step_scores(params: Params, frozen: Params, traj: Trajectory) -> Float[Array, "B T"]:
        params = decoder.full_params(config, params, frozen)
        tokens, positions, segments = full_sequences(traj)
        hidden, _ = decoder.forward(config, params["decoder"], tokens, positions, segments, prefix=traj.prefix)
        return apply_head(hidden[:, 1:], params["score_head"])

    return step_scores


def full_sequences(traj: Trajectory) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"]]:
    """Tokens, positions and segments of the rows that a trajectory was made of; S = T + 1.

    A column of the trajectory has segment 0 where its decision crosses the end of a segment, so a token belongs to the
    segment of either decision beside it.
    """
    tokens = jnp.concatenate([traj.inputs, traj.actions[:, -1:]], axis=1)
    positions = jnp.concatenate([traj.positions, traj.positions[:, -1:] + 1], axis=1)
    as_input = jnp.pad(traj.segments, ((0, 0), (0, 1)))
    as_action = jnp.pad(traj.segments, ((0, 0), (1, 0)))
    return tokens, positions, jnp.maximum(as_input, as_action)
