"""The token sampler: prefill the prompts, decode in one compiled loop, return a trajectory.

Each prompt is read once and its keys and values are shared by its completions. Log-probs are captured as tokens are
sampled, by the function that the trainer uses, at the sampling temperature: of the whole distribution, or with
`sampling.support` of the truncated one, whose tokens then go with the trajectory. The loop ends when every completion
is done. Columns are added to the KV cache a chunk at a time, so that attention reads little more than what is filled.

One step of sampling is in `sample_token.py`; `sampling.max_concurrent` samples the same completions a few rows at a
time (`continuous_batching.py`); `streaming.py` yields them while they grow; `partial.py` resumes unfinished ones.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rljax.ops import sampling as ops
from rljax.rollouts.continuous_batching import decode_in_slots
from rljax.rollouts.decode_state import Completions, DecodeStats, Prefilled, empty_support, should_continue
from rljax.rollouts.sample_token import (
    PenaltyState,
    SampledToken,
    SamplingSettings,
    automaton_step,
    check_logp,
    check_sampling,
    sample_token,
)
from rljax.types import LM, Array, Params, PromptBatch, Sampling, Trajectory, trajectory_of_tokens

CHUNK = 16  # columns are added to the cache a multiple of this at a time: products of odd widths are slow
MAX_CHUNKS = 8  # each is compiled separately


# ------------------------------------------------------------------------------------------------------------- sample


def sample(
    lm: LM, params: Params, frozen: Params, prompts: PromptBatch, sampling: Sampling, seed: int, step: int
) -> Trajectory:
    """Sample sampling.n completions of each of P prompts: B = P·n rows, row p·n + g is completion g of prompt p.

    With `prompts.resume`, the completions it requests. T = L + max_tokens - 1. `group` is the prompt's number;
    `terminated` marks the decision that ended a completion, `truncated` the last one of a completion that reached
    max_tokens; a completion that `stop_after` interrupted has neither. The same (seed, step, prompts.number, g) gives
    the same completion whatever else is in the batch. Raises ValueError for parameters out of range.
    """
    traj, _ = sample_and_count(lm, params, frozen, prompts, sampling, seed, step)
    return traj


def sample_and_count(
    lm: LM, params: Params, frozen: Params, prompts: PromptBatch, sampling: Sampling, seed: int, step: int
) -> tuple[Trajectory, DecodeStats]:
    """`sample`, and what decoding took."""
    check_sampling(sampling)
    check_logp(sampling)
    check_resumed_support(prompts, sampling)
    device_prompts = to_device(prompts, step)
    return sample_on_devices(lm, params, frozen, device_prompts, sampling, jnp.int32(seed))


@partial(jax.jit, static_argnames="lm")
def sample_on_devices(
    lm: LM, params: Params, frozen: Params, prompts: "DevicePrompts", sampling: Sampling, seed: Array
) -> tuple[Trajectory, DecodeStats]:
    """The compiled part of `sample_and_count`: prefill, decoding, the trajectory."""
    lm = bind_params(lm, params, frozen)
    settings = sampling_settings(prompts, sampling, seed)
    prefilled = prefill(lm, prompts, sampling)
    R = len(settings.resumed_length)
    if sampling.max_concurrent is not None and sampling.max_concurrent < R:
        source, _ = prompts.requested(sampling.n)
        completions, routing, stats = decode_in_slots(lm, prefilled, source, settings, sampling)
    else:
        completions, routing, stats = decode(lm, prompts, prefilled, settings, sampling)
    return build_trajectory(prompts, settings, sampling, completions, routing), stats


# ------------------------------------------------------------------------------------------------------------ prompts


@struct.dataclass
class DevicePrompts:
    """`PromptBatch` on the device: what the compiled sampler reads."""

    tokens: Array  # [P L]
    mask: Array  # [P L]
    number: Array  # [P]
    step: Array  # [P] whose key samples the row
    version: Array  # [] of the policy
    requests: Array | None  # [R 2]
    facts: dict[str, Array] | None  # [P L] each, of tokens sampled earlier

    @property
    def chosen(self) -> Array:
        """[P L] bool: the token was sampled earlier."""
        return jnp.zeros_like(self.mask) if self.facts is None else self.facts["chosen"]

    @property
    def terminated(self) -> Array:
        """[P] bool: the row's completion met a stop earlier."""
        if self.facts is None:
            return jnp.zeros(len(self.number), bool)
        return self.facts["terminated"].any(axis=1)

    def requested(self, n: int) -> tuple[Array, Array]:
        """Of each of R completions, the row of its prompt and which of the prompt's completions it is. [R], [R]"""
        if self.requests is not None:
            return self.requests[:, 0], self.requests[:, 1]
        P = len(self.number)
        source = jnp.repeat(jnp.arange(P, dtype=jnp.int32), n)
        index = jnp.tile(jnp.arange(n, dtype=jnp.int32), P)
        return source, index


def to_device(prompts: PromptBatch, step: int) -> DevicePrompts:
    """The prompts as device arrays. Raises ValueError for requests of rows that do not exist."""
    number = jnp.asarray(prompts.number)
    key_step = jnp.full(number.shape, step, jnp.int32)
    requests = None
    facts = None
    if prompts.resume is not None:
        _check_requests(np.asarray(prompts.resume.requests), len(prompts.number))
        requests = jnp.asarray(prompts.resume.requests, jnp.int32)
        if prompts.resume.facts is not None:
            facts = {name: jnp.asarray(value) for name, value in prompts.resume.facts.items()}
        if prompts.resume.start_step is not None:
            key_step = jnp.asarray(prompts.resume.start_step, jnp.int32)
    return DevicePrompts(
        tokens=jnp.asarray(prompts.tokens),
        mask=jnp.asarray(prompts.mask),
        number=number,
        step=key_step,
        version=jnp.int32(step),
        requests=requests,
        facts=facts,
    )


def _check_requests(requests: np.ndarray, num_rows: int) -> None:
    legal = requests.ndim == 2 and len(requests) > 0
    if not (legal and requests.min() >= 0 and requests[:, 0].max() < num_rows):
        raise ValueError(f"prompts.resume.requests: legal: [R 2] of (row below {num_rows}, completion), at least one")


def check_resumed_support(prompts: PromptBatch, sampling: Sampling) -> None:
    """Raise ValueError where what was sampled earlier kept another support than what follows will keep."""
    if prompts.resume is None or prompts.resume.facts is None:
        return
    support = prompts.resume.facts.get("support")
    earlier = None if support is None else np.shape(support)[-1]
    if earlier != sampling.support:
        raise ValueError(f"sampling.support is {sampling.support}; legal: {earlier}, as the resumed tokens have it")


def sampling_settings(
    prompts: DevicePrompts, sampling: Sampling, seed: Array, sampled: Array | int = 0
) -> SamplingSettings:
    """The settings of each of the R completions. sampled: tokens of it that earlier turns sampled, [R] or for all."""
    source, index = prompts.requested(sampling.n)
    P = len(prompts.number)

    def per_completion(value, dtype):
        if value is None:
            return None
        return jnp.broadcast_to(jnp.asarray(value, dtype), P)[source]

    bias = sampling.logit_bias
    if bias is not None and jnp.ndim(bias) == 2:
        bias = bias[source]
    keys = ops.row_keys(seed, prompts.step[source], prompts.number[source], index)
    resumed_length = prompts.chosen.sum(axis=1)[source]
    uniforms_at = jax.vmap(lambda t: ops.token_uniforms(keys, sampled + resumed_length + t), out_axes=1)
    return SamplingSettings(
        uniforms=uniforms_at(jnp.arange(sampling.max_tokens)),
        context_length=prompts.mask.sum(axis=1)[source],
        resumed_length=resumed_length,
        resumed_terminated=prompts.terminated[source],
        temperature=per_completion(sampling.temperature, jnp.float32),
        top_k=per_completion(sampling.top_k, jnp.int32),
        top_p=per_completion(sampling.top_p, jnp.float32),
        min_p=per_completion(sampling.min_p, jnp.float32),
        repetition_penalty=per_completion(sampling.repetition_penalty, jnp.float32),
        logit_bias=bias,
        min_tokens=per_completion(sampling.min_tokens, jnp.int32),
    )


# ------------------------------------------------------------------------------------------------------------ prefill


def bind_params(lm: LM, params: Params, frozen: Params) -> LM:
    """The model with its parameters filled in, prepared once for the whole rollout."""
    if lm.prepare is not None:
        params, frozen = lm.prepare(params, frozen)
    return lm._replace(forward=partial(lm.forward, params, frozen), logits=partial(lm.logits, params, frozen))


def prepare_once(lm: LM, params: Params, frozen: Params) -> tuple[LM, Params, Params]:
    """The model and its parameters for a rollout of several compiled calls, prepared before the first of them."""
    if lm.prepare is None:
        return lm, params, frozen
    return lm._replace(prepare=None), *jax.jit(lm.prepare)(params, frozen)


def prefill(lm: LM, prompts: DevicePrompts, sampling: Sampling) -> Prefilled:
    """Read the prompts with a bound model."""
    segments = prompts.mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = lm.init_cache(*prompts.tokens.shape)
    hidden, cache = lm.forward(prompts.tokens, positions, segments, cache)
    vocabulary = jax.eval_shape(lm.logits, hidden).shape[-1]
    return Prefilled(cache, hidden[:, -1], init_penalty_state(prompts, sampling, vocabulary))


def init_penalty_state(prompts: DevicePrompts, sampling: Sampling, vocabulary: int) -> PenaltyState:
    """Of each prompt, what its tokens mean for the first token to sample."""
    P = len(prompts.number)
    seen = None
    if sampling.repetition_penalty is not None:
        rows = jnp.arange(P)[:, None]
        seen = jnp.zeros((P, vocabulary), bool).at[rows, prompts.tokens].max(prompts.mask)
    stop_state = None
    if sampling.stop_strings is not None:

        def read_column(state, column):
            token, chosen = column
            return jnp.where(chosen, automaton_step(sampling.stop_strings, state, token), state), None

        start = jnp.zeros(P, jnp.int32)
        stop_state, _ = jax.lax.scan(read_column, start, (prompts.tokens.T, prompts.chosen.T))
    return PenaltyState(seen, stop_state)


# ------------------------------------------------------------------------------------------------------------- decode


@struct.dataclass
class DecodeState:
    """R completions in a static batch, all of them at the same column."""

    cache: dict
    hidden: Array  # [R D] of the last token
    completions: Completions
    penalties: PenaltyState
    t: Array  # [] columns sampled


def decode(
    lm: LM, prompts: DevicePrompts, prefilled: Prefilled, settings: SamplingSettings, sampling: Sampling
) -> tuple[Completions, Array | None, DecodeStats]:
    """All completions at once. Returns them, the experts of all tokens but the last of each, and the stats.

    The experts [R S-1 M k] are those of mixture models, else None. No token follows the last one: it is not read.
    """
    state = init_decode_state(lm, prompts, prefilled, settings, sampling, columns=0)
    last = sampling.max_tokens - 1
    columns = chunk_size(last)
    for start in range(0, last, columns):
        state = state.replace(cache=lm.grow(state.cache, columns))
        state = decode_until(lm, state, settings, sampling, min(start + columns, last))
    steps = state.t
    state = sample_last_column(lm, state, settings, sampling)
    routing = None
    if lm.routing is not None:
        routing = lm.routing(state.cache)[:, : prompts.tokens.shape[1] + last]
    R = len(settings.resumed_length)
    stats = DecodeStats(steps=steps, row_steps=steps * R, tokens=state.completions.num_tokens.sum())
    return state.completions, routing, stats


def chunk_size(columns: int) -> int:
    """How many columns to add to the cache at a time."""
    return max(1, -(-columns // (CHUNK * MAX_CHUNKS))) * CHUNK


def init_decode_state(
    lm: LM,
    prompts: DevicePrompts,
    prefilled: Prefilled,
    settings: SamplingSettings,
    sampling: Sampling,
    columns: int,
) -> DecodeState:
    """One row a completion, with room for so many new tokens in the cache."""
    source, _ = prompts.requested(sampling.n)
    if prompts.requests is None:  # neighbors share a prompt: nothing is copied, and on a mesh nothing moves
        cache = lm.fork(prefilled.cache, sampling.n, columns)
        hidden = jnp.repeat(prefilled.hidden, sampling.n, axis=0)
    else:
        cache = lm.grow(lm.gather(prefilled.cache, source), columns)
        hidden = prefilled.hidden[source]
    return DecodeState(
        cache=cache,
        hidden=hidden,
        completions=Completions.empty(settings, sampling),
        penalties=jax.tree.map(lambda x: x[source], prefilled.penalties),
        t=jnp.int32(0),
    )


def decode_until(
    lm: LM, state: DecodeState, settings: SamplingSettings, sampling: Sampling, end: int | Array
) -> DecodeState:
    """Sample up to column `end`, for which the cache has room; fewer if all are done, or `stop_after` of them."""
    R = len(settings.resumed_length)

    def condition(state: DecodeState):
        return (state.t < end) & should_continue(state.completions, R, sampling)

    def body(state: DecodeState):
        return decode_step(lm, state, settings, sampling)

    return jax.lax.while_loop(condition, body, state)


def decode_step(lm: LM, state: DecodeState, settings: SamplingSettings, sampling: Sampling) -> DecodeState:
    """One token in each row that is not done, and one forward pass of all rows."""
    completions, new = sample_column(lm, state, settings, sampling)
    segments = (~completions.done).astype(jnp.int32)[:, None]  # a done row writes padding
    positions = (settings.context_length + state.t)[:, None]
    hidden, cache = lm.forward(new.token[:, None] * segments, positions, segments, state.cache)
    return DecodeState(cache, hidden[:, 0], completions, new.penalties, state.t + 1)


def sample_column(
    lm: LM, state: DecodeState, settings: SamplingSettings, sampling: Sampling
) -> tuple[Completions, SampledToken]:
    """One token in each row that is not done."""
    old = state.completions
    t = state.t
    active = ~old.done
    new = sample_token(lm.logits(state.hidden), t, settings, state.penalties, sampling)
    completions = Completions(
        tokens=old.tokens.at[:, t].set(jnp.where(active, new.token, 0)),
        logp=old.logp.at[:, t].set(jnp.where(active, new.logp, 0.0)),
        num_tokens=old.num_tokens + active,
        terminated=old.terminated | (active & new.terminated),
        done=old.done | new.done,
        support=None if old.support is None else old.support.at[:, t].set(jnp.where(active[:, None], new.support, -1)),
    )
    return completions, new


def sample_last_column(lm: LM, state: DecodeState, settings: SamplingSettings, sampling: Sampling) -> DecodeState:
    """The last token of each row that is not done, unless enough of them are."""

    def draw() -> Completions:
        completions, _ = sample_column(lm, state, settings, sampling)
        return completions

    R = len(settings.resumed_length)
    is_needed = should_continue(state.completions, R, sampling)
    return state.replace(completions=jax.lax.cond(is_needed, draw, lambda: state.completions))


# --------------------------------------------------------------------------------------------------------- trajectory


def build_trajectory(
    prompts: DevicePrompts,
    settings: SamplingSettings,
    sampling: Sampling,
    completions: Completions,
    routing: Array | None,
) -> Trajectory:
    """Each completion after its prompt, one a row; `routing` [R S-1 M k] from the decode loop, or None."""
    source, _ = prompts.requested(sampling.n)

    def per_completion(x):
        return jnp.repeat(x, sampling.n, axis=0) if prompts.requests is None else x[source]

    temperature = jnp.where(settings.temperature == 0, 1.0, settings.temperature)[:, None]
    before = _prompt_facts(prompts, per_completion, temperature, sampling.support)
    after = _completion_facts(prompts, completions, temperature)
    if prompts.facts is None and sampling.stop_after is None:
        del after["version"]  # one policy sampled everything
    facts = {name: jnp.concatenate([before[name], after[name]], axis=1) for name in after}
    traj = trajectory_of_tokens(**facts, group=per_completion(prompts.number))
    return traj if routing is None else traj.replace(routing=routing)


def _prompt_facts(
    prompts: DevicePrompts, per_completion: Callable, temperature: Array, support: int | None
) -> dict[str, Array]:
    """Facts of the prompts' tokens [R L], of those that were sampled earlier too."""
    zeros = jnp.zeros(prompts.tokens.shape)
    facts = prompts.facts
    if facts is None:
        never = jnp.zeros(prompts.tokens.shape, bool)
        facts = {"logp": zeros, "temperature": zeros, "version": zeros.astype(jnp.int32)}
        facts |= {"terminated": never, "truncated": never}
        if support is not None:
            facts["support"] = empty_support(zeros.shape, support)
    chosen = per_completion(prompts.chosen)
    found = {
        "tokens": per_completion(prompts.tokens),
        "segments": per_completion(prompts.mask).astype(jnp.int32),
        "chosen": chosen,
        "logp": per_completion(facts["logp"]),
        "temperature": jnp.where(chosen, per_completion(facts["temperature"]), temperature),
        "version": per_completion(facts["version"]),
        "terminated": per_completion(facts["terminated"]),
        "truncated": per_completion(facts["truncated"]),
    }
    if support is not None:
        found["support"] = per_completion(facts["support"])
    return found


def _completion_facts(prompts: DevicePrompts, completions: Completions, temperature: Array) -> dict[str, Array]:
    """Facts of the new tokens [R N]."""
    shape = completions.tokens.shape
    columns = jnp.arange(shape[1])[None]
    sampled = columns < completions.num_tokens[:, None]
    last = sampled & (columns == completions.num_tokens[:, None] - 1)
    cut = completions.done & ~completions.terminated
    found = {
        "tokens": completions.tokens,
        "segments": sampled.astype(jnp.int32),
        "chosen": sampled,
        "logp": completions.logp,
        "temperature": jnp.broadcast_to(temperature, shape),
        "version": jnp.broadcast_to(prompts.version, shape),
        "terminated": last & completions.terminated[:, None],
        "truncated": last & cut[:, None],
    }
    if completions.support is not None:
        found["support"] = completions.support
    return found
