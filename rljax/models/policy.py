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


def chunk_of(vocabulary: int, backend: str | None = None) -> int:
    """Tokens whose logits are alive at a time: as many as make 4 M logits on a CPU, 128 M elsewhere."""
    logits = 2**22 if (backend or jax.default_backend()) == "cpu" else 2**27
    return max(1, logits // vocabulary)


def make_policy(config: DecoderConfig, chunk_tokens: int | None = None) -> Callable:
    """policy(params, frozen, trajectory) -> PolicyOutput, with log-probs at the temperature each token was drawn at.

    chunk_tokens: tokens whose logits are alive at a time; None: `chunk_of` the vocabulary.
    """
    chunk_tokens = chunk_tokens or chunk_of(config.vocabulary)

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        params = decoder.whole(config, params, frozen)
        places = (traj.inputs, traj.positions, traj.segments)
        hidden, _ = decoder.forward(config, params["decoder"], *places, routing=traj.routing)
        temperature = jnp.ones_like(traj.logp) if traj.temperature is None else traj.temperature
        head = lambda h: decoder.logits(config, params["decoder"], h)  # noqa: E731
        logp, entropy, sum_pi_squared = chunked_logprobs(head, hidden, traj.actions, temperature, chunk_tokens)
        values = jnp.einsum("btd,d->bt", hidden, params["value_head"]) if "value_head" in params else None
        return PolicyOutput(logp=logp, entropy=entropy, values=values, sum_pi_squared=sum_pi_squared)

    return policy


def make_annotate(policy: Callable, needs: tuple[str, ...]) -> Callable:
    """annotate(state, traj) -> traj with the fields in `needs` filled by forward passes without gradient.

    ref_logp, teacher_logp: the policy on state.frozen["reference"] and ["teacher"]. On state.params: values [B T+1], 0
    after the last decision; old_logp, where a method tells the trainer's log-probs from the sampler's; sum_pi_squared.
    `baseline` takes other answers: the experiment fills it.
    """
    needs = tuple(name for name in needs if name != "baseline")
    frozen_parts = {"ref_logp": "reference", "teacher_logp": "teacher"}
    known = {"values", "old_logp", "sum_pi_squared", *frozen_parts}
    if set(needs) - known:
        raise ValueError(f"annotate cannot fill {sorted(set(needs) - known)}; it can fill {sorted(known)}")

    @jax.jit
    def fill(params, frozen, traj):
        fields = {}
        for field, part in frozen_parts.items():
            if field in needs:
                fields[field] = policy(frozen[part], frozen, traj).logp
        if {"values", "old_logp", "sum_pi_squared"} & set(needs):
            own = policy(params, frozen, traj)
            if "values" in needs:
                if own.values is None:
                    raise ValueError("this algorithm needs values: give the parameters a head (policy.with_value_head)")
                fields["values"] = jnp.pad(jnp.where(traj.mask, own.values, 0.0), ((0, 0), (0, 1)))
            if "old_logp" in needs:
                fields["old_logp"] = own.logp
            if "sum_pi_squared" in needs:
                fields["sum_pi_squared"] = own.sum_pi_squared
        return fields

    def annotate(state: TrainState, traj: Trajectory) -> Trajectory:
        for field, part in frozen_parts.items():
            if field in needs and part not in state.frozen:
                raise ValueError(f"this algorithm needs {field}: put the parameters of that policy in frozen[{part!r}]")
        return traj.replace(**fill(state.params, state.frozen, traj)) if needs else traj

    return annotate
