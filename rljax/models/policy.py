"""The policy as the trainer uses it, and the Trajectory fields that need a model: reference and old log-probs, values.

Parameters are a dict: "decoder" or "lora", and optionally "value_head", "critic", "score_head".
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models import decoder, lora
from rljax.models.decoder import DecoderConfig
from rljax.ops.logprobs import chunked_logprobs, in_chunks, on_support, or_only_action
from rljax.ops.trust_region import directed_kl
from rljax.types import AnnotateFn, DivergenceFn, Params, PolicyFn, PolicyOutput, TrainState, Trajectory

# ---------------------------------------------------------------------------------------------------------- parameters


def init(config: DecoderConfig, key: Array) -> Params:
    """{"decoder": ...}, at random."""
    return {"decoder": decoder.init(config, key)}


def with_value_head(params: Params, config: DecoderConfig) -> Params:
    """An actor-critic on one trunk: adds "value_head" [D], zero, so that the first values are 0."""
    return {**params, "value_head": jnp.zeros(config.hidden_size)}


def with_critic(params: Params, config: DecoderConfig) -> Params:
    """Adds "critic": a critic with its own trunk, which begins as a copy of the policy's."""
    trunk = {"decoder": jax.tree.map(jnp.copy, params["decoder"])}
    return {**params, "critic": with_value_head(trunk, config)}


def with_adapter(params: Params, config: DecoderConfig, key: Array) -> tuple[Params, Params]:
    """(trained, frozen) for LoRA: the adapter and the heads are trained; the base is frozen.

    The reference is the base without an adapter.
    """
    heads = {name: x for name, x in params.items() if name != "decoder"}
    adapter = lora.init(config.adapter, params["decoder"], key)
    frozen = {"base": {"decoder": params["decoder"]}, "reference": {}}
    return {"lora": adapter, **heads}, frozen


def logical_axes(config: DecoderConfig, params: Params) -> Params:
    """Logical axis names for each of `params`, which may be only some of the model's parameters."""
    trunk = decoder.param_axes(config)
    axes = {
        "decoder": trunk,
        "value_head": (None,),
        "score_head": (None,),
        "critic": {"decoder": trunk, "value_head": (None,)},
    }
    if config.adapter is not None:
        axes["lora"] = lora.adapter_axes(config.adapter, trunk, decoder.abstract(config))
    return _select_like(params, axes)


def _select_like(tree: Params, axes: Params) -> Params:
    """The entries of `axes` for the leaves of `tree`."""
    return {name: _select_like(x, axes[name]) if isinstance(x, dict) else axes[name] for name, x in tree.items()}


# -------------------------------------------------------------------------------------------------------------- policy


def default_chunk_tokens(vocab_size: int, backend: str | None = None, devices: int | None = None) -> int:
    """Number of tokens whose logits exist at the same time: 4 M logits on a CPU, 128 M on each other device.

    It is at least one column of all rows (`ops.logprobs`), so a batch of very many rows needs micro-batches.
    """
    on_cpu = (backend or jax.default_backend()) == "cpu"
    num_logits = 2**22 if on_cpu else 2**27 * (devices or jax.device_count())
    return max(1, num_logits // vocab_size)


def make_policy(config: DecoderConfig, chunk_tokens: int | None = None) -> PolicyFn:
    """policy(params, frozen, trajectory) -> PolicyOutput, with log-probs at the temperature each token was drawn at.

    Log-probs, entropy and Σ π² are renormalized over `Trajectory.support`, where the sampler kept it.

    Args:
      chunk_tokens: number of tokens whose logits exist at the same time; None: `default_chunk_tokens`.
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(config.vocab_size, config.backend, config.num_devices)

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        params = decoder.full_params(config, params, frozen)
        trunk = params["decoder"]
        hidden = decoder.hidden_of(config, trunk, traj)
        logits_of = partial(decoder.logits, config, trunk)
        logp, entropy, sum_pi_squared = chunked_logprobs(
            logits_of, hidden, traj.actions, temperatures(traj), chunk_tokens, traj.support
        )
        if "critic" in params:
            critic = params["critic"]
            critic_hidden = decoder.hidden_of(config, critic["decoder"], traj.replace(routing=None))
            values = apply_head(critic_hidden, critic["value_head"])
        elif "value_head" in params:
            values = apply_head(hidden, params["value_head"])
        else:
            values = None
        return PolicyOutput(logp=logp, entropy=entropy, values=values, sum_pi_squared=sum_pi_squared)

    return policy


def temperatures(traj: Trajectory) -> Float[Array, "B T"]:
    """The temperature each token was drawn at; 1 if the trajectory has none."""
    return jnp.ones_like(traj.logp) if traj.temperature is None else traj.temperature


def apply_head(hidden: Float[Array, "B T D"], head: Float[Array, "D"]) -> Float[Array, "B T"]:
    """One number for each column: hidden · head, in float32."""
    return jnp.einsum("btd,d->bt", hidden, head, preferred_element_type=jnp.float32)


def make_divergence(
    config: DecoderConfig, chunk_tokens: int | None = None, kl_direction: str = "old_new"
) -> DivergenceFn:
    """divergence(params, old, frozen, trajectory) -> exact KL [B T] between two policies at each decision.

    By default KL(old ‖ new), of the distributions at the temperature each token was drawn at, renormalized over
    `Trajectory.support` where the sampler kept it. The logits of both are
    computed from hidden states in chunks, in forward and backward pass, so no [B T V] array exists. There is no
    gradient with respect to `old`.

    Args:
      chunk_tokens: number of decisions whose logits exist at the same time; None: half of `default_chunk_tokens`, since
      there are two policies.
      kl_direction: as in `ops.trust_region.directed_kl`.
    """
    of_one = default_chunk_tokens(config.vocab_size, config.backend, config.num_devices)
    chunk_tokens = chunk_tokens or max(1, of_one // 2)

    def divergence(params: Params, old: Params, frozen: Params, traj: Trajectory) -> Float[Array, "B T"]:
        old_trunk = decoder.full_params(config, jax.lax.stop_gradient(old), frozen)["decoder"]
        new_trunk = decoder.full_params(config, params, frozen)["decoder"]
        old_hidden = decoder.hidden_of(config, old_trunk, traj)
        new_hidden = decoder.hidden_of(config, new_trunk, traj)

        def scaled_logits(trunk, hidden, temperature):
            return decoder.logits(config, trunk, hidden).astype(jnp.float32) / temperature[..., None]

        def kl_of_columns(old_hidden, new_hidden, temperature, *support):
            old_logits = scaled_logits(old_trunk, old_hidden, temperature)
            new_logits = scaled_logits(new_trunk, new_hidden, temperature)
            if support:
                old_logits = on_support(old_logits, *support)
                new_logits = on_support(new_logits, *support)
            return directed_kl(old_logits, new_logits, kl_direction)

        columns = [old_hidden, new_hidden, temperatures(traj)]
        if traj.support is not None:
            columns.append(or_only_action(traj.support, traj.actions))
        return in_chunks(kl_of_columns, chunk_tokens, *columns)

    return divergence


# ------------------------------------------------------------------------------------------------------------ annotate

FROZEN_POLICIES = {"ref_logp": "reference", "teacher_logp": "teacher"}  # field: the entry of `frozen` it is taken from
OWN_FIELDS = ("values", "old_logp", "sum_pi_squared", "entropy")  # computed by the current policy


def make_annotate(policy: PolicyFn, needs: tuple[str, ...]) -> AnnotateFn:
    """annotate(state, traj) -> traj with the fields in `needs` computed by forward passes without gradient.

    * ref_logp, teacher_logp: of the policy on state.frozen["reference"] and ["teacher"]. Their routers choose their own
      experts: the recorded routing is the sampling policy's. They are renormalized over `traj.support`, as the policy
      is: a KL estimated from them is that of the two truncated distributions.
    * values [B T+1]: on state.params, 0 after the last decision. Where an environment recorded `next_inputs`, also
      final_values [B T], and a row whose last column is a decision ends in the value of what that one led to.
    * old_logp: the trainer's own log-probs, for methods that distinguish them from the sampler's.
    * sum_pi_squared, entropy.

    `baseline` needs other completions, so it is left to the experiment. Raises ValueError for any other field, and when
    called where parameters are missing.
    """
    needs = tuple(name for name in needs if name != "baseline")
    known = {*OWN_FIELDS, *FROZEN_POLICIES}
    unknown = set(needs) - known
    if unknown:
        raise ValueError(f"annotate cannot fill {sorted(unknown)}; it can fill {sorted(known)}")

    @jax.jit
    def fill(params, frozen, traj):
        fields = {}
        for field, part in FROZEN_POLICIES.items():
            if field in needs:
                fields[field] = policy(decoder.on_device(frozen[part]), frozen, traj.replace(routing=None)).logp
        if set(OWN_FIELDS) & set(needs):
            fields |= _own_fields(policy, params, frozen, traj, needs)
        return fields

    def annotate(state: TrainState, traj: Trajectory) -> Trajectory:
        for field, part in FROZEN_POLICIES.items():
            if field in needs and part not in state.frozen:
                raise ValueError(f"this algorithm needs {field}: put the parameters of that policy in frozen[{part!r}]")
        if not needs:
            return traj
        return traj.replace(**fill(state.params, state.frozen, traj))

    annotate.lower = lambda state, traj: fill.lower(state.params, state.frozen, traj)  # for shapes
    return annotate


def _own_fields(policy: PolicyFn, params: Params, frozen: Params, traj: Trajectory, needs: tuple[str, ...]) -> dict:
    """Those of OWN_FIELDS that are needed, and final_values."""
    fields = {}
    output = policy(params, frozen, traj)
    if "values" in needs:
        if output.values is None:
            raise ValueError("this algorithm needs values: give the parameters a head (policy.with_value_head)")
        fields["values"] = jnp.pad(jnp.where(traj.mask, output.values, 0.0), ((0, 0), (0, 1)))
        if traj.next_inputs is not None:
            final_values = policy(params, frozen, traj.replace(inputs=traj.next_inputs)).values
            after = jnp.where(traj.mask[:, -1], final_values[:, -1], 0.0)
            fields |= {"final_values": final_values, "values": fields["values"].at[:, -1].set(after)}
    if "old_logp" in needs:
        fields["old_logp"] = output.logp
    if "sum_pi_squared" in needs:
        fields["sum_pi_squared"] = output.sum_pi_squared
    if "entropy" in needs:
        fields["entropy"] = output.entropy
    return fields


# ----------------------------------------------------------------------------------------------------------- reference


def sync_reference(state: TrainState, alpha: float = 1.0, entry: str = "reference") -> TrainState:
    """reference ← (1 - α) reference + α policy (TR-DPO, arXiv:2404.09656; TRL's `ref_model_mixup_alpha`).

    The reference is `frozen[entry]`: with "teacher" the moving average that teaches in self-distillation.

    α = 1 copies the policy. The reference of an adapter must then be an adapter too, which begins as a copy of the
    policy's. Raises ValueError if the reference has no parameters, or some that are not trained.
    """
    reference = state.frozen[entry]
    if not reference or reference.keys() - state.params.keys():
        raise ValueError(
            f"the {entry} has {sorted(reference)}, the policy trains {sorted(state.params)}; "
            "begin with a copy of the trained parameters"
        )
    mixed = {name: _interpolate(part, state.params[name], alpha) for name, part in reference.items()}
    mixed = jax.device_put(mixed, jax.tree.map(lambda x: x.sharding, reference))
    return state.replace(frozen={**state.frozen, entry: mixed})


@partial(jax.jit, static_argnames="alpha")
def _interpolate(old: Params, new: Params, alpha: float) -> Params:
    def interpolate_leaf(x, y):
        return ((1.0 - alpha) * x + alpha * y).astype(x.dtype)

    return jax.tree.map(interpolate_leaf, decoder.on_device(old), new)
