"""What the decode loops share: prompts after prefill, completions so far, and what decoding took."""

import jax
import jax.numpy as jnp
from flax import struct

from rljax.rollouts.sample_token import PenaltyState, SamplingSettings
from rljax.types import LM, Array, Sampling


@struct.dataclass
class Prefilled:
    """Rows whose prompt has been read: all that sampling their next token needs."""

    cache: dict
    hidden: Array  # [P D] of the last token
    penalties: PenaltyState


@struct.dataclass
class Completions:
    """R completions so far, N = max_tokens columns."""

    tokens: Array  # [R N]
    logp: Array  # [R N]
    num_tokens: Array  # [R] columns sampled
    terminated: Array  # [R] bool: a stop token or stop string was met
    done: Array  # [R] bool: terminated, or max_tokens reached
    support: Array | None = None  # [R N k] the tokens that each was drawn from, -1 = no token; None: not kept

    @classmethod
    def empty(cls, settings: SamplingSettings, sampling: Sampling) -> "Completions":
        """No token sampled yet; a completion that is resumed may be done already."""
        max_tokens = sampling.max_tokens
        zeros = jnp.zeros((len(settings.resumed_length), max_tokens))
        terminated = settings.resumed_terminated
        return cls(
            tokens=zeros.astype(jnp.int32),
            logp=zeros,
            num_tokens=jnp.zeros_like(settings.resumed_length),
            terminated=terminated,
            done=terminated | (settings.resumed_length >= max_tokens),
            support=empty_support(zeros.shape, sampling.support),
        )


def empty_support(shape: tuple[int, ...], k: int | None) -> Array | None:
    """[*shape k] of no token (-1); None where the support is not kept."""
    return None if k is None else jnp.full((*shape, k), -1, jnp.int32)


@struct.dataclass
class DecodeStats:
    """What decoding took. Utilization of the rows: tokens / row_steps."""

    steps: Array  # forward passes of one token a row
    row_steps: Array  # rows computed in them
    tokens: Array  # sampled


def gather_prefilled(lm: LM, prefilled: Prefilled, rows: Array) -> Prefilled:
    """Some of the rows, each as often as it is named."""
    return Prefilled(
        cache=lm.gather(prefilled.cache, rows),
        hidden=prefilled.hidden[rows],
        penalties=jax.tree.map(lambda x: x[rows], prefilled.penalties),
    )


def should_continue(completions: Completions, count: int, sampling: Sampling) -> Array:
    """Whether fewer of the first `count` completions are done than the sampling asks for. bool []"""
    num_done = completions.done[:count].sum()
    return num_done < min(sampling.stop_after or count, count)
