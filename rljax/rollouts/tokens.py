"""The token sampler: prefill each prompt once, fork its cache to its group, decode in one compiled loop.

Log-probs are captured as tokens are drawn, by the same function that the trainer uses, at the sampling temperature and
of the untruncated distribution. The loop ends when every row has met a stop token.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rljax.ops import sampling as ops
from rljax.ops.logprobs import chosen_logp
from rljax.types import LM, Params, Rows, Sampling, Trajectory, trajectory_of_tokens


def sample(lm: LM, params: Params, frozen: Params, rows: Rows, sampling: Sampling, seed: int, step: int) -> Trajectory:
    """Draw sampling.n answers to each of P prompts: B = P·n rows, row p·n + g being answer g to prompt p.

    T = L + max_tokens - 1. `group` is the prompt's number; `terminated` marks the decision for a stop token,
    `truncated` the last one of an answer that met none. The same (seed, step, rows.number, g) gives the same answer
    whatever else is in the batch. Raises ValueError for parameters out of range.
    """
    _check(sampling)
    arrays = (jnp.asarray(rows.tokens), jnp.asarray(rows.mask), jnp.asarray(rows.number))
    return _sample(lm, params, frozen, *arrays, sampling, jnp.int32(seed), jnp.int32(step))


def _check(sampling: Sampling) -> None:
    if sampling.n < 1 or sampling.max_tokens < 1:
        raise ValueError(f"n and max_tokens must be at least 1, not {sampling.n} and {sampling.max_tokens}")
    limits = {"temperature": (0.0, 1e4), "top_k": (1, 1 << 30), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0)}
    for name, (low, high) in limits.items():
        value = getattr(sampling, name)
        if value is not None and not bool(jnp.all((jnp.asarray(value) >= low) & (jnp.asarray(value) <= high))):
            raise ValueError(f"sampling.{name} is {value}; legal: {low:g} to {high:g}")


def _per_row(value, rows: int, n: int, dtype):
    """A scalar or [P] setting, one per answer: [P·n]."""
    return None if value is None else jnp.repeat(jnp.broadcast_to(jnp.asarray(value, dtype), (rows,)), n)


@partial(jax.jit, static_argnames=("lm",))
def _sample(lm, params, frozen, tokens, mask, number, sampling, seed, step):
    params, frozen = (params, frozen) if lm.prepare is None else lm.prepare(params, frozen)
    P, L = tokens.shape
    n, N = sampling.n, sampling.max_tokens
    answer = jnp.tile(jnp.arange(n, dtype=jnp.int32), P)
    keys = ops.row_keys(seed, step, jnp.repeat(number, n), answer)
    temperature = _per_row(sampling.temperature, P, n, jnp.float32)
    draw = partial(
        _draw,
        temperature=temperature,
        top_k=_per_row(sampling.top_k, P, n, jnp.int32),
        top_p=_per_row(sampling.top_p, P, n, jnp.float32),
        min_p=_per_row(sampling.min_p, P, n, jnp.float32),
    )

    segments = mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = lm.init_cache(P, L + N)
    hidden, cache = lm.forward(params, frozen, tokens, positions, segments, cache)
    fork = jnp.repeat(jnp.arange(P), n)
    out = _decode(
        lm, params, frozen, lm.gather(cache, fork), hidden[:, -1][fork], segments.sum(1)[fork], sampling, keys, draw
    )
    drawn, logp, alive, ended, cache = out

    used = jnp.where(temperature == 0, 1.0, temperature)[:, None]
    prompt_zeros = jnp.zeros((P * n, L))
    last = alive & ~jnp.pad(alive[:, 1:], ((0, 0), (0, 1)))
    traj = trajectory_of_tokens(
        tokens=jnp.concatenate([tokens[fork], drawn], axis=1),
        segments=jnp.concatenate([segments[fork], alive.astype(jnp.int32)], axis=1),
        chosen=jnp.concatenate([prompt_zeros > 0, alive], axis=1),
        logp=jnp.concatenate([prompt_zeros, logp], axis=1),
        temperature=jnp.broadcast_to(used, (P * n, L + N)),
        terminated=jnp.concatenate([prompt_zeros > 0, last & ended[:, None]], axis=1),
        truncated=jnp.concatenate([prompt_zeros > 0, last & ~ended[:, None]], axis=1),
        group=number[fork],
    )
    return traj if lm.routing is None else traj.replace(routing=lm.routing(cache)[:, :-1])


def _draw(logits, uniform, temperature, top_k, top_p, min_p):
    """One token a row, and its log-prob under the untruncated distribution at its temperature."""
    greedy = temperature == 0
    used = jnp.where(greedy, 1.0, temperature)
    scaled = logits.astype(jnp.float32) / used[:, None]
    probs = ops.truncate(jax.nn.softmax(scaled, axis=-1), top_k, top_p, min_p)
    token = jnp.where(greedy, ops.argmax(scaled), ops.invert_cdf(probs, uniform))
    return token, chosen_logp(logits, token, used)


def _decode(lm, params, frozen, cache, hidden, lengths, sampling, keys, draw):
    """The loop. Returns tokens, log-probs, alive [B N] (True up to and with the stop token), ended [B], the cache."""
    B, N = hidden.shape[0], sampling.max_tokens
    stop = jnp.asarray(sampling.stop, jnp.int32)

    def unfinished(carry):
        t, _, _, ended, *_ = carry
        return (t < N) & ~ended.all()

    def one_token(carry):
        t, cache, hidden, ended, tokens, logps, alive = carry
        token, logp = draw(lm.logits(params, frozen, hidden), ops.token_uniforms(keys, t))
        going = ~ended
        put = lambda buffer, new: buffer.at[:, t].set(jnp.where(going, new, 0))  # noqa: E731
        tokens, logps, alive = put(tokens, token), put(logps, logp), alive.at[:, t].set(going)
        ended = ended | (token[:, None] == stop[None]).any(axis=1)
        new = (going & ~ended).astype(jnp.int32)[:, None]
        hidden, cache = lm.forward(params, frozen, token[:, None] * new, (lengths + t)[:, None], new, cache)
        return t + 1, cache, hidden[:, 0], ended, tokens, logps, alive

    blank = jnp.zeros((B, N))
    start = (jnp.int32(0), cache, hidden, jnp.zeros(B, bool), blank.astype(jnp.int32), blank, blank > 0)
    _, cache, _, ended, tokens, logps, alive = jax.lax.while_loop(unfinished, one_token, start)
    return tokens, logps, alive, ended, cache
