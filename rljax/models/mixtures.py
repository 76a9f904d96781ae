"""Mixtures of two policies, as models that the sampler decodes from: each token is drawn from the mixture at its state.

    geometric_mixture     softmax((1 - β) log π + β log μ)      y' of Nash-MD; μ the reference
    arithmetic_mixture    (1 - α) π + α μ                       teacher-mixed sampling of MiniLLM; μ the teacher

π has the trained parameters, μ those of an entry of `frozen`. Each token takes two forward passes, and there are two
caches. The log-probs that the sampler reports are the mixture's. Routing is not recorded.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.ops.kl import Logits
from rljax.types import LM


@lru_cache
def geometric_mixture(config: DecoderConfig, beta: float, entry: str = "reference") -> LM:
    """π^{1-β} μ^β, normalized at each state. β = 0 is π, β = 1 is μ."""

    def combine(logits, other_logits):
        return (1.0 - beta) * logits + beta * other_logits

    return _mixture(config, None, entry, combine)


@lru_cache
def arithmetic_mixture(
    config: DecoderConfig, alpha: float = 0.2, entry: str = "teacher", other_config: DecoderConfig | None = None
) -> LM:
    """(1 - α) π + α μ at each state, for sampling at temperature 1; 0 < α < 1.

    Args:
      other_config: of a μ whose parameters are all in frozen[entry]; None: `config`, over π's frozen["base"] if any.
    Raises ValueError for another α.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"α is the teacher's share of a mixture: it lies between 0 and 1, and is not {alpha}")

    def combine(logits, other_logits):
        own = jax.nn.log_softmax(logits) + jnp.log1p(-alpha)
        other = jax.nn.log_softmax(other_logits) + jnp.log(alpha)
        return jnp.logaddexp(own, other)

    return _mixture(config, other_config, entry, combine)


def _mixture(
    config: DecoderConfig, other_config: DecoderConfig | None, entry: str, combine: Callable[[Logits, Logits], Logits]
) -> LM:
    """Both models side by side: caches and parameters as pairs, hidden states one behind the other."""
    own = decoder.language_model(config)
    other = decoder.language_model(other_config or config)

    def prepare(params, frozen):
        own_params, _ = own.prepare(params, frozen)
        other_params, _ = other.prepare(decoder.on_device(frozen[entry]), frozen if other_config is None else {})
        return (own_params, other_params), {}

    def forward(params, frozen, tokens, positions, segments, cache):
        hidden, own_cache = own.forward(params[0], frozen, tokens, positions, segments, cache[0])
        other_hidden, other_cache = other.forward(params[1], frozen, tokens, positions, segments, cache[1])
        return jnp.concatenate([hidden, other_hidden], axis=-1), (own_cache, other_cache)

    def logits(params, frozen, hidden):
        own_hidden = hidden[..., : config.hidden_size]
        other_hidden = hidden[..., config.hidden_size :]
        return combine(own.logits(params[0], frozen, own_hidden), other.logits(params[1], frozen, other_hidden))

    def of_both(name):
        def apply(caches, *args):
            return getattr(own, name)(caches[0], *args), getattr(other, name)(caches[1], *args)

        return apply

    def init_cache(rows, length):
        return own.init_cache(rows, length), other.init_cache(rows, length)

    def scatter(caches, rows, others):
        return own.scatter(caches[0], rows, others[0]), other.scatter(caches[1], rows, others[1])

    return LM(
        init_cache=init_cache,
        forward=forward,
        logits=logits,
        gather=of_both("gather"),
        scatter=scatter,
        fork=of_both("fork"),
        grow=of_both("grow"),
        crop=of_both("crop"),
        prepare=prepare,
        row_shards=own.row_shards,
    )
