"""Heads that judge: a score of a whole answer (reward model), log-odds of each step (process reward model).

Both read the hidden state *after* the token they judge, where a value reads the one before its decision: that of the
answer's last token is the model's last word, and stands in no column of a Trajectory, whose T decisions are between
T + 1 tokens. So the tokens are put together again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.policy import read
from rljax.types import Params, Trajectory


def with_score_head(params: Params, config: DecoderConfig, key) -> Params:
    """Adds "score_head" [D], normal of standard deviation 1/√(D + 1) (as TRL begins)."""
    return {**params, "score_head": jax.random.normal(key, (config.width,)) * (config.width + 1) ** -0.5}


def make_score_model(config: DecoderConfig) -> Callable:
    """score(params, frozen, trajectory) -> [B]: read at the last token of each row that the mask calls the answer's.

    NaN where it calls none so.
    """
    after = make_step_model(config)

    def score(params: Params, frozen: Params, traj: Trajectory):
        T = traj.mask.shape[1]
        last = T - 1 - jnp.argmax(traj.mask[:, ::-1], axis=1)
        read_last = jnp.take_along_axis(after(params, frozen, traj), last[:, None], axis=1)[:, 0]
        return jnp.where(traj.mask.any(axis=1), read_last, jnp.nan)

    return score


def make_step_model(config: DecoderConfig) -> Callable:
    """step_logits(params, frozen, trajectory) -> [B T]: what the head says after each decision's token."""

    def step_logits(params: Params, frozen: Params, traj: Trajectory):
        params = decoder.whole(config, params, frozen)
        hidden, _ = decoder.forward(config, params["decoder"], *whole_rows(traj))
        return read(hidden[:, 1:], params["score_head"])

    return step_logits


def whole_rows(traj: Trajectory):
    """Tokens, positions and segments [B T + 1] of the rows that a trajectory was made of.

    A column's segment is 0 where its decision crosses the end of a segment; its token belongs to the segment of either
    neighbouring decision.
    """
    tokens = jnp.concatenate([traj.inputs, traj.actions[:, -1:]], axis=1)
    positions = jnp.concatenate([traj.positions, traj.positions[:, -1:] + 1], axis=1)
    as_input = jnp.pad(traj.segments, ((0, 0), (0, 1)))
    as_action = jnp.pad(traj.segments, ((0, 0), (1, 0)))
    return tokens, positions, jnp.maximum(as_input, as_action)
