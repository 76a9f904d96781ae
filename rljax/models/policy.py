"""The policy as the trainer sees it, and the facts that need a model: reference log-probs, values, old log-probs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.ops.logprobs import chunked_logprobs
from rljax.types import Params, PolicyOutput, TrainState, Trajectory


def init(config: DecoderConfig, key) -> Params:
    """{"decoder": ...}, at random."""
    return {"decoder": decoder.init(config, key)}


def with_value_head(params: Params, config: DecoderConfig) -> Params:
    """An actor-critic on one trunk: adds "value_head" [D], zero, so that its first values are 0."""
    return {**params, "value_head": jnp.zeros(config.width)}


def logical_axes(config: DecoderConfig, params: Params) -> Params:
    """Logical axis names for each of `params`."""
    axes = {"decoder": decoder.logical_axes(config), "value_head": (None,)}
    return {name: axes[name] for name in params}


def make_policy(config: DecoderConfig, chunk_tokens: int = 4096) -> Callable:
    """policy(params, frozen, trajectory) -> PolicyOutput, with log-probs at the temperature each token was drawn at."""

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        hidden, _ = decoder.forward(config, params["decoder"], traj.inputs, traj.positions, traj.segments)
        temperature = jnp.ones_like(traj.logp) if traj.temperature is None else traj.temperature
        head = lambda h: decoder.logits(config, params["decoder"], h)  # noqa: E731
        logp, entropy = chunked_logprobs(head, hidden, traj.actions, temperature, chunk_tokens)
        values = jnp.einsum("btd,d->bt", hidden, params["value_head"]) if "value_head" in params else None
        return PolicyOutput(logp=logp, entropy=entropy, values=values)

    return policy


def make_annotate(policy: Callable, needs: tuple[str, ...]) -> Callable:
    """annotate(state, traj) -> traj with the fields in `needs` filled by forward passes without gradient.

    ref_logp: the policy on state.frozen["reference"]. values: on state.params, [B T+1], 0 after the last decision.
    old_logp: on state.params, where a method tells the trainer's log-probs from the sampler's.
    """
    known = {"ref_logp", "values", "old_logp"}
    if set(needs) - known:
        raise ValueError(f"annotate cannot fill {sorted(set(needs) - known)}; it can fill {sorted(known)}")

    @jax.jit
    def fill(params, frozen, traj):
        fields = {}
        if "ref_logp" in needs:
            fields["ref_logp"] = policy(frozen["reference"], frozen, traj).logp
        if {"values", "old_logp"} & set(needs):
            own = policy(params, frozen, traj)
            if "values" in needs:
                if own.values is None:
                    raise ValueError("this algorithm needs values: give the parameters a head (policy.with_value_head)")
                fields["values"] = jnp.pad(jnp.where(traj.mask, own.values, 0.0), ((0, 0), (0, 1)))
            if "old_logp" in needs:
                fields["old_logp"] = own.logp
        return fields

    def annotate(state: TrainState, traj: Trajectory) -> Trajectory:
        if "ref_logp" in needs and "reference" not in state.frozen:
            raise ValueError('this algorithm needs ref_logp: put a copy of the parameters in state.frozen["reference"]')
        return traj.replace(**fill(state.params, state.frozen, traj)) if needs else traj

    return annotate
