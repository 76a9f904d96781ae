"""The policy as the trainer sees it, and the facts that need a model: reference log-probs, values, old log-probs."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rljax.models import decoder, lora
from rljax.models.decoder import DecoderConfig
from rljax.ops.logprobs import chunked_logprobs, in_chunks
from rljax.ops.trust_region import directed_kl
from rljax.types import Params, PolicyOutput, TrainState, Trajectory


def init(config: DecoderConfig, key) -> Params:
    """{"decoder": ...}, at random."""
    return {"decoder": decoder.init(config, key)}


def with_value_head(params: Params, config: DecoderConfig) -> Params:
    """An actor-critic on one trunk: adds "value_head" [D], zero, so that its first values are 0."""
    return {**params, "value_head": jnp.zeros(config.width)}


def with_critic(params: Params, config: DecoderConfig) -> Params:
    """A critic with a trunk of its own, at first a copy of the policy's: adds "critic"."""
    trunk = {"decoder": jax.tree.map(jnp.copy, params["decoder"])}
    return {**params, "critic": with_value_head(trunk, config)}


def with_adapter(params: Params, config: DecoderConfig, key) -> tuple[Params, Params]:
    """What is trained of a model with an adapter (heads too), and the frozen parts: the base, which is the reference
    too."""
    base, heads = {"decoder": params["decoder"]}, {name: x for name, x in params.items() if name != "decoder"}
    return {"lora": lora.init(config.adapter, params["decoder"], key), **heads}, {"base": base, "reference": {}}


def logical_axes(config: DecoderConfig, params: Params) -> Params:
    """Logical axis names for each of `params`, which may be a part of the model's."""
    trunk = decoder.logical_axes(config)
    axes = {"decoder": trunk, "value_head": (None,), "score_head": (None,)}
    axes["critic"] = {"decoder": trunk, "value_head": (None,)}
    if config.adapter is not None:
        axes["lora"] = lora.logical_axes(config.adapter, trunk, decoder.abstract(config))
    return _like(params, axes)


def _like(tree: Params, axes: Params) -> Params:
    return {n: _like(x, axes[n]) if isinstance(x, dict) else axes[n] for n, x in tree.items()}


def chunk_of(vocabulary: int, backend: str | None = None) -> int:
    """Tokens whose logits are alive at a time: as many as make 4 M logits on a CPU, 128 M on each other device.

    At least one column of all rows is (`ops.logprobs`), so a batch of very many rows wants micro-batches.
    """
    on_cpu = (backend or jax.default_backend()) == "cpu"
    logits = 2**22 if on_cpu else 2**27 * jax.device_count()
    return max(1, logits // vocabulary)


def make_policy(config: DecoderConfig, chunk_tokens: int | None = None) -> Callable:
    """policy(params, frozen, trajectory) -> PolicyOutput, with log-probs at the temperature each token was drawn at.

    chunk_tokens: tokens whose logits are alive at a time; None: `chunk_of` the vocabulary.
    """
    chunk_tokens = chunk_tokens or chunk_of(config.vocabulary)

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        params = decoder.whole(config, params, frozen)
        places = (traj.inputs, traj.positions, traj.segments)
        run = partial(decoder.forward, config)
        hidden, _ = run(params["decoder"], *places, routing=traj.routing)
        temperature = temperatures(traj)
        head = lambda h: decoder.logits(config, params["decoder"], h)  # noqa: E731
        logp, entropy, sum_pi_squared = chunked_logprobs(head, hidden, traj.actions, temperature, chunk_tokens)
        values = None
        if "critic" in params:
            values = read(run(params["critic"]["decoder"], *places)[0], params["critic"]["value_head"])
        elif "value_head" in params:
            values = read(hidden, params["value_head"])
        return PolicyOutput(logp=logp, entropy=entropy, values=values, sum_pi_squared=sum_pi_squared)

    return policy


def temperatures(traj: Trajectory):
    """What each token was drawn at [B T]; 1 where nothing is said."""
    return jnp.ones_like(traj.logp) if traj.temperature is None else traj.temperature


def make_divergence(config: DecoderConfig, chunk_tokens: int | None = None, kl_direction: str = "old_new") -> Callable:
    """divergence(params, old, frozen, trajectory) -> exact KL [B T] between two policies at each decision.

    By default KL(old ‖ new), of the distributions at the temperature each token was drawn at. No distribution is kept:
    both policies' logits are made of hidden states, `chunk_tokens` decisions at a time (None: half of `chunk_of`, as
    there are two), in forward and backward passes alike; [B T V] never stands in memory. `old` is a constant.
    """
    chunk_tokens = chunk_tokens or max(1, chunk_of(config.vocabulary) // 2)

    def divergence(params: Params, old: Params, frozen: Params, traj: Trajectory):
        places = (traj.inputs, traj.positions, traj.segments)
        both = [decoder.whole(config, x, frozen)["decoder"] for x in (jax.lax.stop_gradient(old), params)]
        hidden = [decoder.forward(config, x, *places, routing=traj.routing)[0] for x in both]
        temperature = temperatures(traj)

        def of_columns(before, after, t):
            logits = [decoder.logits(config, x, h) for x, h in zip(both, (before, after), strict=True)]
            return directed_kl(*(z.astype(jnp.float32) / t[..., None] for z in logits), kl_direction)

        return in_chunks(of_columns, chunk_tokens, *hidden, temperature)

    return divergence


def read(hidden, head):
    """A number of each column: hidden [B T D] · head [D], in float32."""
    return jnp.einsum("btd,d->bt", hidden, head, preferred_element_type=jnp.float32)


def make_annotate(policy: Callable, needs: tuple[str, ...]) -> Callable:
    """annotate(state, traj) -> traj with the fields in `needs` filled by forward passes without gradient.

    ref_logp, teacher_logp: the policy on state.frozen["reference"] and ["teacher"], which choose experts of their own
    (the record is of the policy's). On state.params: values [B T+1], 0 after the last decision, and final_values [B T]
    where an environment showed `next_inputs`; old_logp, where a method tells the trainer's log-probs from the
    sampler's; sum_pi_squared.
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
                fields[field] = policy(decoder.on_device(frozen[part]), frozen, traj.replace(routing=None)).logp
        if {"values", "old_logp", "sum_pi_squared"} & set(needs):
            own = policy(params, frozen, traj)
            if "values" in needs:
                if own.values is None:
                    raise ValueError("this algorithm needs values: give the parameters a head (policy.with_value_head)")
                fields["values"] = jnp.pad(jnp.where(traj.mask, own.values, 0.0), ((0, 0), (0, 1)))
                if traj.next_inputs is not None:
                    fields["final_values"] = policy(params, frozen, traj.replace(inputs=traj.next_inputs)).values
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


def refresh_reference(state: TrainState, share: float = 1.0) -> TrainState:
    """reference ← (1 - share) reference + share · policy (TR-DPO, arXiv:2404.09656): 1 copies it, less averages.

    The reference of an adapter must then be one too, at first a copy of the adapter's start, which changes nothing.
    Raises ValueError where it holds no part of what is trained.
    """
    old = state.frozen["reference"]
    if not old or old.keys() - state.params.keys():
        raise ValueError(f"the reference holds {sorted(old)}, the policy {sorted(state.params)}: begin with a copy")
    mixed = {name: _mix(part, state.params[name], share) for name, part in old.items()}
    mixed = jax.device_put(mixed, jax.tree.map(lambda x: x.sharding, old))
    return state.replace(frozen={**state.frozen, "reference": mixed})


@partial(jax.jit, static_argnames="share")
def _mix(old, new, share: float):
    mixed = lambda x, y: ((1.0 - share) * x + share * y).astype(x.dtype)  # noqa: E731
    return jax.tree.map(mixed, decoder.on_device(old), new)
