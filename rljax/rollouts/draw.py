"""One token a row: from logits, the row's settings and one uniform number to the token and its log-prob.

The same for every engine: what differs between them is which rows are at work.
"""

import jax
import jax.numpy as jnp
from flax import struct

from rljax.ops import sampling as ops
from rljax.ops.logprobs import softmax, softmax_logp
from rljax.types import Array, Sampling

LIMITS = {
    "temperature": (0.0, 1e4),
    "top_k": (1, 1 << 30),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-4, 1e4),
    "min_tokens": (0, 1 << 30),
}


@struct.dataclass
class Settings:
    """What does not change while R answers are drawn; None switches a setting off."""

    keys: Array  # [R] of the answer's uniform numbers
    length: Array  # [R] tokens of the prompt, with those of the answer that it holds
    before: Array  # [R] those
    ended: Array  # [R] whether the last of them was a stop
    temperature: Array  # [R]
    top_k: Array | None  # [R]
    top_p: Array | None  # [R]
    min_p: Array | None  # [R]
    repetition_penalty: Array | None  # [R]
    logit_bias: Array | None  # [V], or [R V]
    min_tokens: Array | None  # [R]

    def of(self, rows) -> "Settings":
        """Those of some of the answers."""
        shared = self.logit_bias is not None and self.logit_bias.ndim == 1
        some = jax.tree.map(lambda x: x[rows], self.replace(logit_bias=None) if shared else self)
        return some.replace(logit_bias=self.logit_bias) if shared else some


@struct.dataclass
class Memory:
    """What an answer's earlier tokens mean for the next; None where no setting asks."""

    seen: Array | None  # [B V] tokens of the prompt and of the answer (repetition_penalty)
    read: Array | None  # [B] state of the automaton of the stop strings; below 0: it has met one


def check(sampling: Sampling) -> None:
    """Raise ValueError, saying what would be legal, for parameters out of range."""
    if sampling.n < 1 or sampling.max_tokens < 1:
        raise ValueError(f"n and max_tokens must be at least 1, not {sampling.n} and {sampling.max_tokens}")
    for name in ("max_concurrent", "stop_after"):
        value = getattr(sampling, name)
        if value is not None and value < 1:
            raise ValueError(f"sampling.{name} is {value}; legal: at least 1, or None")
    for name, (low, high) in LIMITS.items():
        value = getattr(sampling, name)
        if value is not None and not bool(jnp.all((jnp.asarray(value) >= low) & (jnp.asarray(value) <= high))):
            raise ValueError(f"sampling.{name} is {value}; legal: {low:g} to {high:g}")


def follow(automaton: Array, state: Array, token: Array) -> Array:
    """The state after reading a token; below 0: a stop string stands there."""
    return automaton[jnp.maximum(state, 0), token]


def draw(logits, t, settings: Settings, memory: Memory, sampling: Sampling):
    """The t-th token of each row since the start, its log-prob, whether it ends the answer, whether the answer is over
    (that, or its length), and the memory with it.

    logits [B V]; t: scalar or [B].
    """
    place = settings.before + t
    uniform = ops.token_uniforms(settings.keys, place)
    stop = jnp.asarray(sampling.stop, jnp.int32)
    logits = logits.astype(jnp.float32)
    shaped = _shape(logits, place, settings, memory, stop)
    greedy = settings.temperature == 0
    used = jnp.where(greedy, 1.0, settings.temperature)
    policy = softmax(logits, used)
    masses = policy.masses if shaped is logits else softmax(shaped, used).masses
    masses = ops.truncate(masses, settings.top_k, settings.top_p, settings.min_p)
    most = jax.lax.optimization_barrier(masses.max(axis=-1, keepdims=True))  # without: spread over [B V] on CPU
    masses = jnp.where(greedy[:, None], masses == most, masses)
    token = ops.invert_cdf(masses, jnp.where(greedy, 0.0, uniform))
    if sampling.logp == "policy":
        logp = softmax_logp(policy, token)
    else:
        logp = jnp.log(jnp.take_along_axis(masses, token[:, None], axis=-1)[:, 0] / masses.sum(axis=-1))
    ended = (token[:, None] == stop[None]).any(axis=1)
    if memory.seen is not None:
        memory = memory.replace(seen=memory.seen.at[jnp.arange(len(token)), token].set(True))
    if memory.read is not None:
        memory = memory.replace(read=follow(sampling.stop_strings, memory.read, token))
        ended = ended | (memory.read < 0)
    return token, logp, ended, ended | (place + 1 >= sampling.max_tokens), memory


def _shape(logits, place, settings: Settings, memory: Memory, stop):
    """What bias, penalty and minimum length make of the logits."""
    if settings.logit_bias is not None:
        logits = logits + jnp.atleast_2d(settings.logit_bias)
    if settings.repetition_penalty is not None:
        r = settings.repetition_penalty[:, None]
        logits = jnp.where(memory.seen, jnp.where(logits > 0, logits / r, logits * r), logits)
    if settings.min_tokens is not None and stop.size:
        lowered = jnp.where((place < settings.min_tokens)[:, None], -jnp.inf, logits[:, stop])
        logits = logits.at[:, stop].set(lowered)
    return logits
