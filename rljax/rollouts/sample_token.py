"""One step of sampling: from logits, each row's settings and one uniform number to a token and its log-prob.

The static batch, continuous batching and streaming all call `sample_token`; they differ in which rows take part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rljax.ops import sampling as ops
from rljax.ops.logprobs import chosen_logp, index_in_support, on_support, softmax, softmax_logp
from rljax.types import Array, Sampling

MIN_TEMPERATURE = 1e-5  # above 0: logits divided by less leave no digits of their difference, or overflow
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

    uniforms: Array  # [R N] the number in [0, 1) that selects each new token
    context_length: Array  # [R] tokens of the row before the first new one: the prompt, and what was sampled earlier
    resumed_length: Array  # [R] how many of those were sampled earlier (`PromptBatch.resume`); 0 for a new completion
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
    support: Array | None  # [B k] the tokens it was drawn from, -1 = no token; None: not kept


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
    temperature = jnp.asarray(sampling.temperature)
    if bool(jnp.any((temperature > 0) & (temperature < MIN_TEMPERATURE))):
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}; legal: 0 (greedy), or from {MIN_TEMPERATURE:g}"
        )
    _check_support(sampling)


UNCHANGED = {"top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": 0.0, "min_tokens": 0}


def distribution_settings(sampling: Sampling) -> list[str]:
    """The settings, temperature aside, that change the distribution which tokens are drawn from."""
    changed = []
    for name, unchanged in UNCHANGED.items():
        value = getattr(sampling, name)
        if value is None or (name == "min_tokens" and not sampling.stop):
            continue
        if unchanged is None or bool(np.any(np.asarray(value) != unchanged)):
            changed.append(name)
    return changed


def check_logp(sampling: Sampling) -> None:
    """Raise ValueError where the trainer's log-probs would, unsaid, be of another distribution than the sampler's."""
    changed = distribution_settings(sampling)
    if changed and sampling.support is None and sampling.logp is None:
        raise ValueError(
            f"sampling.{changed[0]} changes the distribution that tokens are drawn from: a gradient of the policy's "
            "whole distribution is then another one; legal: support=k, which keeps the tokens drawn from and "
            "renormalizes over them, or logp='policy' or 'drawn', which say whose log-prob is meant"
        )


def _check_support(sampling: Sampling) -> None:
    if sampling.support is None:
        return
    if sampling.logp is not None:
        raise ValueError(
            f"sampling.logp is {sampling.logp!r}; legal with support: None, the log-prob renormalized over it"
        )
    most = 1 if sampling.top_k is None else int(np.max(sampling.top_k))
    if sampling.support < most:
        raise ValueError(f"sampling.support is {sampling.support}; legal: at least {most}, what top_k keeps")
    for name in ("repetition_penalty", "logit_bias"):
        if name in distribution_settings(sampling):
            raise ValueError(
                f"sampling.{name} changes probabilities inside the support, which the trainer cannot renormalize away; "
                "legal with support: top_k, top_p, min_p and min_tokens"
            )


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
    last = settings.uniforms.shape[1] - 1  # idle slots count on beyond it
    column = jnp.broadcast_to(jnp.minimum(t, last), position.shape)[:, None]
    uniform = jnp.take_along_axis(settings.uniforms, column, axis=1)[:, 0]
    stop = jnp.asarray(sampling.stop, jnp.int32)
    logits = logits.astype(jnp.float32)
    processed = _process_logits(logits, position, settings, penalties, stop)

    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)
    policy = softmax(logits, temperature)
    masses = policy.masses if processed is logits else softmax(processed, temperature).masses
    cuts = settings.top_k, settings.top_p, settings.min_p
    if sampling.support is None:
        masses = ops.truncate(masses, *cuts)
        token, support = _draw(masses, uniform, greedy), None
    else:
        token, support = _draw_from_support(masses, cuts, sampling.support, uniform, greedy)

    if support is not None:
        logp = chosen_logp(on_support(logits, support), index_in_support(support, token), temperature)
    elif sampling.logp != "drawn":
        logp = softmax_logp(policy, token)
    else:
        chosen_mass = jnp.take_along_axis(masses, token[:, None], axis=-1)[:, 0]
        logp = jnp.where(greedy, 0.0, jnp.log(chosen_mass / masses.sum(axis=-1)))

    terminated = (token[:, None] == stop[None]).any(axis=1)
    if penalties.seen is not None:
        penalties = penalties.replace(seen=penalties.seen.at[jnp.arange(len(token)), token].set(True))
    if penalties.stop_state is not None:
        penalties = penalties.replace(stop_state=automaton_step(sampling.stop_strings, penalties.stop_state, token))
        terminated = terminated | (penalties.stop_state < 0)
    done = terminated | (position + 1 >= sampling.max_tokens)
    return SampledToken(token, logp, terminated, done, penalties, support)


def _draw(masses: Array, uniform: Array, greedy: Array) -> Array:
    """The column of the masses [B N] that each row's uniform number selects, or where it is greedy the likeliest."""
    drawn = ops.invert_cdf(masses, uniform)
    return jax.lax.cond(greedy.any(), lambda: jnp.where(greedy, ops.argmax(masses), drawn), lambda: drawn)


def _draw_from_support(masses: Array, cuts: tuple, k: int, uniform: Array, greedy: Array) -> tuple[Array, Array]:
    """A token of the k most likely ones that the cuts leave, and their ids [B k], the likeliest first; -1 = no token.

    They are drawn from in the order of the vocabulary, as all of its tokens would be.
    """
    V = masses.shape[-1]
    if k > V:
        raise ValueError(f"sampling.support is {k}; legal: at most the vocabulary of {V} tokens")
    kept, support = ops.truncate_to(masses, k, *cuts)
    ids, kept = jax.lax.sort((support, kept), num_keys=1)
    token = jnp.take_along_axis(ids, _draw(kept, uniform, greedy)[:, None], axis=-1)[:, 0]
    return jnp.maximum(token, 0), support  # of masses that are NaN none is left


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
