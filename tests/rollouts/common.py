"""A small sharp model, prompts of many lengths, and what "the same sample" means (docs: DESIGN.md §3)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from rljax.data.prompts import pad_left
from rljax.models import decoder, policy
from rljax.ops import sampling as ops
from rljax.types import PromptBatch, Sampling, Trajectory
from tests import bounds

CONFIG = decoder.DecoderConfig(53, 32, 2, 4, 2, 8, 48, tie_word_embeddings=False)
LM = decoder.language_model(CONFIG)
STOP = (3, 7)
# Between a uniform number and a boundary of the cumulative distribution: closer than this, either token is right. The
# boundary moves by at most half of what logits do, and two programs' logits of up to 11 were found 7e-6 apart.
CLOSE = 1e-5


def make_params():
    """Random, and sharpened: at the start a decoder's distributions are nearly flat."""
    params = policy.init(CONFIG, jax.random.key(0))
    scale = params["decoder"]["norm"]["scale"]
    return {"decoder": params["decoder"] | {"norm": {"scale": 2.5 * scale}}}


def make_rows(lengths, start: int = 0, width: int = 0, seed: int = 0) -> PromptBatch:
    """Random prompts; the one with number i depends on (seed, i) alone."""
    numbers = range(start, start + len(lengths))
    ids = [np.random.default_rng([seed, i]).integers(8, 53, n).tolist() for i, n in zip(numbers, lengths, strict=True)]
    return rows_of(ids, numbers, max(width, *lengths))


def rows_of(ids, numbers, width: int) -> PromptBatch:
    tokens, mask = pad_left(ids, width, 5)
    return PromptBatch(tokens, mask, np.array(numbers, np.int32), [{} for _ in ids], 0)


def take(rows: PromptBatch, which) -> PromptBatch:
    columns = [rows.columns[i] for i in np.arange(len(rows.columns))[which]]
    return PromptBatch(rows.tokens[which], rows.mask[which], rows.number[which], columns, 0)


def completions(traj: Trajectory, sampling: Sampling):
    """Tokens, log-probs and mask of the completions alone. [B N]"""
    last = slice(traj.mask.shape[1] - sampling.max_tokens, None)
    return tuple(np.asarray(x)[:, last] for x in (traj.actions, traj.logp, traj.mask))


@jax.jit
def logits_of(params, traj: Trajectory):
    hidden, _ = decoder.forward(CONFIG, params["decoder"], traj.inputs, traj.positions, traj.segments)
    return decoder.logits(CONFIG, params["decoder"], hidden)


@partial(jax.jit, static_argnames="count")
def uniforms(seed, step, prompt, completion, count):
    keys = ops.row_keys(seed, step, prompt, completion)
    return jax.vmap(lambda t: ops.token_uniforms(keys, t), out_axes=1)(jnp.arange(count))


def kept(probs, top_k=None, top_p=None, min_p=None):
    """The filters, by sorting: which tokens of each distribution [.. V] may be drawn."""
    order = np.argsort(-probs, axis=-1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=-1)
    alive = np.broadcast_to(np.arange(probs.shape[-1]) < (top_k or probs.shape[-1]), probs.shape)
    if top_p is not None:
        mass = np.cumsum(ranked * alive, axis=-1) / (ranked * alive).sum(axis=-1, keepdims=True)
        before = np.concatenate([np.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
        alive = alive & (before < top_p)
    if min_p is not None:
        alive = alive & (ranked >= min_p * ranked[..., :1])
    out = np.zeros(probs.shape, bool)
    np.put_along_axis(out, order, alive, axis=-1)
    return out


def draws(params, rows: PromptBatch, sampling: Sampling, seed: int, step: int, traj: Trajectory):
    """The tokens that float64 draws from the same uniforms after the same prefixes, and each uniform's distance to the
    nearest boundary of the cumulative distribution. [B N] twice; settings that are scalars.
    """
    n, N = sampling.n, sampling.max_tokens
    prompt, completion = np.repeat(rows.number, n), np.tile(np.arange(n, dtype=np.int32), len(rows.number))
    uniform = np.float64(uniforms(seed, step, prompt, completion, N))
    logits = np.float64(logits_of(params, traj))[:, -N:] / sampling.temperature
    probs = softmax(logits, axis=-1)
    probs = np.where(kept(probs, sampling.top_k, sampling.top_p, sampling.min_p), probs, 0.0)
    cdf = np.cumsum(probs, axis=-1) / probs.sum(axis=-1, keepdims=True)
    tokens = (cdf <= uniform[..., None]).sum(axis=-1)
    boundaries = np.where(np.arange(probs.shape[-1]) < probs.shape[-1] - 1, cdf, np.inf)  # 1 is none
    return tokens, np.abs(boundaries - uniform[..., None]).min(axis=-1)


def close_rows(traj: Trajectory, margins) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: whether a draw of it met a boundary, and the number of draws before the first that did."""
    N = margins.shape[1]
    met = (margins < CLOSE) & np.asarray(traj.mask)[:, -N:]
    return met.any(axis=1), np.where(met.any(axis=1), met.argmax(axis=1), N)


def assert_same_sample(sampling: Sampling, traj: Trajectory, other: Trajectory, margins) -> int:
    """Equal completions up to the first draw that met a boundary, in at most 5 % of rows. Returns how many met one.

    margins: [B N] of `traj`, whose rows are those of `other`.
    """
    met, first = close_rows(traj, margins)
    (tokens, logp, mask), (tokens2, logp2, mask2) = completions(traj, sampling), completions(other, sampling)
    compared = np.arange(tokens.shape[1]) < first[:, None]
    np.testing.assert_array_equal(np.where(compared, mask, 0), np.where(compared, mask2, 0))
    compared &= mask
    np.testing.assert_array_equal(np.where(compared, tokens, 0), np.where(compared, tokens2, 0))
    rounding = bounds.of_logp(CONFIG, traj)
    np.testing.assert_allclose(np.where(compared, logp, 0), np.where(compared, logp2, 0), rtol=0, atol=rounding)
    assert met.mean() <= 0.05, f"{met.sum()} of {len(met)} rows met a boundary"
    return int(met.sum())
