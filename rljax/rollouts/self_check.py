"""Whether sampler and trainer agree to the bit on this machine: measured, not assumed.

`DecoderConfig.batch_invariant` gives every batch the same products. Whether a compiler then rounds each of them alike
in every program is found by trying: a few completions are sampled, in the batches of a run, and scored as the trainer
does. A run with `batch_invariant` begins with `require_batch_invariance`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.rollouts.sampler import sample
from rljax.types import LM, Params, PolicyFn, PromptBatch, Sampling, Trajectory

PROMPT_LENGTHS = (1, 9, 5)
COMPLETIONS = 6  # of each prompt
NEW_TOKENS = 24


def sampler_gap(lm: LM, policy: PolicyFn, params: Params, frozen: Params, vocab_size: int) -> float:
    """The largest |log-prob of the trainer - log-prob of the sampler| over completions of random prompts.

    They are sampled in one batch, in slots, and one alone; and scored together, one alone, and under a gradient.

    Args:
      lm: the sampler's functions of the model.
      policy: the trainer's.
    """

    @jax.jit
    def under_gradient(params, frozen, traj):
        def total(params):
            logp = policy(params, frozen, traj).logp
            return jnp.where(traj.mask, logp, 0.0).sum(), logp

        return jax.value_and_grad(total, has_aux=True)(params)[0][1]

    together = jax.jit(policy)
    sampling = Sampling(n=COMPLETIONS, max_tokens=NEW_TOKENS)
    several = _random_prompts(vocab_size, PROMPT_LENGTHS)
    alone = _random_prompts(vocab_size, PROMPT_LENGTHS[:1])
    gaps = []
    for prompts, settings in (
        (several, sampling),
        (several, sampling.replace(max_concurrent=4)),
        (alone, sampling.replace(n=1)),
    ):
        traj = sample(lm, params, frozen, prompts, settings, 0, 0)
        first = jax.tree.map(lambda x: x[:1], traj)
        gaps += [
            _largest_gap(together(params, frozen, traj).logp, traj),
            _largest_gap(together(params, frozen, first).logp, first),
            _largest_gap(under_gradient(params, frozen, traj), traj),
        ]
    return float(np.max(gaps))  # NaN where one is NaN, as max() is not


def require_batch_invariance(
    lm: LM, policy: PolicyFn, params: Params, frozen: Params, vocab_size: int, say: Callable[[str], None]
) -> float:
    """Measures the gap of sampler and trainer, says it, and raises ValueError where it is not 0.

    Args:
      say: prints a line.
    """
    gap = sampler_gap(lm, policy, params, frozen, vocab_size)
    devices = jax.devices()
    where = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    say(f"batch_invariant: log-probs of sampler and trainer differ by at most {gap:.2g} ({where})")
    if gap != 0.0:
        raise ValueError(
            f"batch_invariant does not hold on {where}: log-probs of sampler and trainer differ by {gap:.2g}; "
            "legal here: batch_invariant = False, with the trainer's own old_logp or a correction"
        )
    return gap


def _random_prompts(vocab_size: int, lengths: tuple[int, ...]) -> PromptBatch:
    """Left-padded prompts of random tokens."""
    random = np.random.default_rng(0)
    width = max(lengths)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    tokens = np.where(mask, random.integers(0, vocab_size, mask.shape), 0).astype(np.int32)
    columns: list[dict[str, Any]] = [{} for _ in lengths]
    return PromptBatch(tokens, mask, np.arange(len(lengths), dtype=np.int32), columns, 0)


def _largest_gap(logp, traj: Trajectory) -> float:
    return float(jnp.where(traj.mask, jnp.abs(logp - traj.logp), 0.0).max())
