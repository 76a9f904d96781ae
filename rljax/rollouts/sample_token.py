"""One step of sampling: from logits, each row's settings and one uniform number to a token and its log-prob.

The static batch, continuous batching and streaming all call `sample_token`; they differ in which rows take part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rljax.ops import sampling as ops
from rljax.ops.logprobs import softmax, softmax_logp
from rljax.types import Array, Sampling

LEGAL_RANGES = {
    "temperature": (0.0, 1e4),
    "top_k": (1, 1 << 30),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-4, 1e4),
    "min_tokens": (0, 1 << 30),
}


@struct.dataclass
class SamplingSettings:
    """The settings of R completions, constant while they are sampled; None: the setting is off."""

    keys: Array  # [R] PRNG key of each completion
    context_length: Array  # [R] tokens of the row before the first new one: the prompt, and what was sampled earlier
    resumed_length: Array  # [R] how many of those were sampled earlier (`Rows.resume`); 0 for a new completion
    resumed_terminated: Array  # [R] bool: the last of those was a stop
    temperature: Array  # [R]
    top_k: Array | None  # [R]
    top_p: Array | None  # [R]
    min_p: Array | None  # [R]
    repetition_penalty: Array | None  # [R]
    logit_bias: Array | None  # [V], or [R V]
    min_tokens: Array | None  # [R]

    def take(self, rows: Array) -> "SamplingSettings":
        """The settings of some of the completions."""
        if self.logit_bias is None or self.logit_bias.ndim == 2:
            return jax.tree.map(lambda x: x[rows], self)
        per_row = jax.tree.map(lambda x: x[rows], self.replace(logit_bias=None))
        return per_row.replace(logit_bias=self.logit_bias)


@struct.dataclass
class PenaltyState:
    """What a row's earlier tokens mean for the next one; None: no setting needs it."""

    seen: Array | None  # [B V] bool: the token occurs in the prompt or the completion (repetition_penalty)
    stop_state: Array | None  # [B] state of the automaton of the stop strings; below 0: a stop string was completed


class SampledToken(NamedTuple):
    """One new token of each of B rows."""

    token: Array  # [B]
    logp: Array  # [B]
    terminated: Array  # [B] bool: it is a stop token, or completes a stop string
    done: Array  # [B] bool: terminated, or the completion has reached max_tokens
    penalties: PenaltyState  # after the token


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError, saying what would be legal, for a parameter out of range."""
    if sampling.n < 1 or sampling.max_tokens < 1:
        raise ValueError(f"n and max_tokens must be at least 1, not {sampling.n} and {sampling.max_tokens}")
    for name in ("max_concurrent", "stop_after"):
        value = getattr(sampling, name)
        if value is not None and value < 1:
            raise ValueError(f"sampling.{name} is {value}; legal: at least 1, or None")
    for name, (low, high) in LEGAL_RANGES.items():
        value = getattr(sampling, name)
        if value is None:
            continue
        inside = (jnp.asarray(value) >= low) & (jnp.asarray(value) <= high)
        if not bool(jnp.all(inside)):
            raise ValueError(f"sampling.{name} is {value}; legal: {low:g} to {high:g}")


def automaton_step(automaton: Array, state: Array, token: Array) -> Array:
    """The state of the stop automaton [states V] after it reads a token; below 0: a stop string was completed."""
    return automaton[jnp.maximum(state, 0), token]


def sample_token(
    logits: Array, t: int | Array, settings: SamplingSettings, penalties: PenaltyState, sampling: Sampling
) -> SampledToken:
    """Sample the t-th new token of each row.

    Args: logits: [B V]. t: scalar, or [B]. settings, penalties: of these B rows.
    """
    position = settings.resumed_length + t
    uniform = ops.token_uniforms(settings.keys, position)
    stop = jnp.asarray(sampling.stop, jnp.int32)
    logits = logits.astype(jnp.float32)
    processed = _process_logits(logits, position, settings, penalties, stop)

    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)
    policy = softmax(logits, temperature)
    masses = policy.masses if processed is logits else softmax(processed, temperature).masses
    masses = ops.truncate(masses, settings.top_k, settings.top_p, settings.min_p)
    most = jax.lax.optimization_barrier(masses.max(axis=-1, keepdims=True))  # without: spread over [B V] on CPU
    masses = jnp.where(greedy[:, None], masses == most, masses)
    token = ops.invert_cdf(masses, jnp.where(greedy, 0.0, uniform))

    if sampling.logp == "policy":
        logp = softmax_logp(policy, token)
    else:
        chosen_mass = jnp.take_along_axis(masses, token[:, None], axis=-1)[:, 0]
        logp = jnp.log(chosen_mass / masses.sum(axis=-1))

    terminated = (token[:, None] == stop[None]).any(axis=1)
    if penalties.seen is not None:
        penalties = penalties.replace(seen=penalties.seen.at[jnp.arange(len(token)), token].set(True))
    if penalties.stop_state is not None:
        penalties = penalties.replace(stop_state=automaton_step(sampling.stop_strings, penalties.stop_state, token))
        terminated = terminated | (penalties.stop_state < 0)
    done = terminated | (position + 1 >= sampling.max_tokens)
    return SampledToken(token, logp, terminated, done, penalties)


def _process_logits(logits, position, settings: SamplingSettings, penalties: PenaltyState, stop):
    """Logit bias, repetition penalty and minimum length, in this order."""
    if settings.logit_bias is not None:
        logits = logits + jnp.atleast_2d(settings.logit_bias)
    if settings.repetition_penalty is not None:
        penalty = settings.repetition_penalty[:, None]
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(penalties.seen, penalized, logits)
    if settings.min_tokens is not None and stop.size:
        too_short = (position < settings.min_tokens)[:, None]
        stop_logits = jnp.where(too_short, -jnp.inf, logits[:, stop])
        logits = logits.at[:, stop].set(stop_logits)
    return logits
