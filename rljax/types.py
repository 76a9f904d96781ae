"""The furniture: every pytree and every bundle of functions that the rooms hand to one another.

**B rows, T decisions, time last; column t of every field speaks of the same decision.** The next-token shift happens
once, in `trajectory_of_tokens`; nobody shifts afterwards. Frozen means never mutated: the loop fills fields with
`replace`. A field that an algorithm does not need is None.

Letters: B rows, T decisions, S tokens (S = T + 1), P prompts, G answers per prompt (B = P·G), L prompt columns,
V vocabulary, D width, K reward components.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

Array = jax.Array | np.ndarray
Params = Any  # a nested dict of arrays
Scalar = float | Float[jax.Array, ""]  # traced where a run is one compiled function of its hyperparameters


# ------------------------------------------------------------------------------------------------- facts and credit


@struct.dataclass
class Trajectory:
    """What happened: the facts of B rows of T decisions.

    A row is prompt and answer. Inside a segment `actions[:, t] == inputs[:, t + 1]`; the last chosen token stands only
    in `actions`. Scores and rewards are NaN where a row could not be judged (never silently 0).
    """

    inputs: Array  # [B T ...] token ids (or observations) the policy saw at t
    actions: Array  # [B T ...] what it chose
    logp: Array  # [B T] log-prob of that choice under the policy that made it (behaviour)
    mask: Array  # [B T] True where the policy itself chose: not prompt, tool output or padding
    positions: Array | None = None  # [B T] place of the input in its segment, from 0
    segments: Array | None = None  # [B T] 0 = padding; several per row only after packing
    temperature: Array | None = None  # [B T] at which it was drawn; the policy rescales its logits by it
    group: Array | None = None  # [B] rows that share a prompt or start state (ids, any order)
    scores: Array | None = None  # [B K] each verifier's raw result; NaN = not judged
    next_inputs: Array | None = None  # [B T ...] what an environment showed after it, before any reset
    rewards: Array | None = None  # [B T] per decision; an outcome reward stands on the last chosen token
    step_ends: Array | None = None  # [B T] bool: ends of reasoning steps (process rewards)
    baseline: Array | None = None  # [B] score of a companion answer (ReMax's greedy one)
    old_logp: Array | None = None  # [B T] the trainer's own recomputation before the update; None means `logp`
    ref_logp: Array | None = None  # [B T] the frozen reference
    teacher_logp: Array | None = None  # [B T] the teacher of a distillation
    values: Array | None = None  # [B T+1]
    final_values: Array | None = None  # [B T] V(last observation), read where truncated
    terminated: Array | None = None  # [B T] bool: this decision ended the episode (EOS)
    truncated: Array | None = None  # [B T] bool: the episode was cut after this decision (length)
    dist: Any = None  # [B T ...] parameters of the old distribution, where a method needs all of it
    routing: Array | None = None  # [B T M k] experts chosen at sampling time in each mixture layer, for replay
    version: Array | None = None  # [B T] which policy version chose it
    sum_pi_squared: Array | None = None  # [B T] Σ_v π_old(v)², where a baseline is weighted by it


@struct.dataclass
class Batch:
    """What to learn from it. `traj` stays the facts; filters shrink `mask`, never `traj.mask`."""

    traj: Trajectory
    advantages: Array  # [B T]
    mask: Array  # [B T] starts as traj.mask
    returns: Array | None = None  # [B T] targets of the values
    weight: Array | None = None  # [B T] coefficient of each term in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B T] each: what `prepare` found out for `loss`


@struct.dataclass
class Pairs:
    """B comparisons of two answers to one prompt: the batch of DPO and of reward models.

    Chosen and rejected are separate fields, so that any cut of the batch keeps pairs. Their widths may differ.
    """

    chosen: Trajectory  # [B T]
    rejected: Trajectory  # [B T']
    margin: Array | None = None  # [B] by how much the chosen one is better, where a rater said so
    weight: Array | None = None  # [B] coefficient of each pair in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B] each: what `prepare` found out for `loss`


@struct.dataclass
class Unpaired:
    """B answers, each judged good or bad alone: the batch of KTO and BCO."""

    traj: Trajectory  # [B T]
    desirable: Array  # [B] bool
    mismatched: Trajectory | None = None  # [B T'] each prompt with another prompt's answer (KTO's z)
    weight: Array | None = None  # [B] coefficient of each answer in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B] each: what `prepare` found out for `loss`


@struct.dataclass
class PolicyOutput:
    """What the policy being trained says of the same decisions."""

    logp: Array  # [B T]
    entropy: Array | None = None  # [B T] nats
    values: Array | None = None  # [B T]
    kl: Array | None = None  # [B T] exact KL to `traj.dist`, in nats
    sum_pi_squared: Array | None = None  # [B T] Σ_v π(v)²


@struct.dataclass
class Transition:
    """One step of an environment, or n of them, for replay: the batch of Q-learning (leading axes free)."""

    observation: Array
    action: Array
    reward: Array  # of n steps: discounted, summed
    next_observation: Array  # the last one of the episode where it ended
    discount: Array  # of the value of next_observation: γ^n; 0 where terminated, not where truncated
    weight: Array | None = None  # coefficient of each term in the sum; set once per optimizer step


@struct.dataclass
class TrainState:
    """Everything a resumed run needs. `step` counts turns of the experiment's loop, not optimizer updates."""

    step: Array  # scalar int32
    params: Params  # trained leaves only
    opt_state: Any
    key: Array  # PRNG key, split by every update
    frozen: Params = struct.field(default_factory=dict)  # LoRA base, reference: neither donated nor differentiated
    cursor: Array = 0  # data position: prompts drawn so far
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # KL and entropy coefficients ...
    extra: Any = None  # replay buffer, environment state, target network, running means


# ------------------------------------------------------------------------------------------------ bundles of functions


class Algorithm(NamedTuple):
    """One paper, as pure functions at three scales. A variant is an argument, a wrapper or a `_replace`."""

    credit: Callable  # (Trajectory, coefficients) -> Batch: the whole rollout batch; groups, episodes
    loss: Callable  # (PolicyOutput, Batch) -> ([B T], metrics {name: [B T]}): one decision, unreduced
    weights: Callable  # (mask, segments) -> weight [B T]: over the whole optimizer batch
    needs: tuple[str, ...] = ()  # Trajectory fields that annotate must fill; wrappers add theirs
    prepare: Callable | None = None  # (PolicyOutput, Batch, key) -> Batch: no gradient, before the cut; None: identity


class Objective(NamedTuple):
    """All that `update` knows of a method."""

    prepare: Callable  # (params, frozen, batch, key) -> batch: sets the weights, over the whole optimizer batch
    loss: Callable  # (params, frozen, batch) -> (sum, metrics {name: (sum, count)}; *_max, *_min by extremum)


class LM(NamedTuple):
    """What a sampler is given of a language model; rollouts know no more."""

    init_cache: Callable  # (rows, length) -> cache
    forward: Callable  # (params, frozen, tokens, positions, segments, cache) -> (hidden, cache)
    logits: Callable  # (params, frozen, hidden) -> [.. V]
    gather: Callable  # (cache, rows) -> cache: those rows of it
    scatter: Callable  # (cache, rows, other) -> cache: refill finished slots
    fork: Callable  # (cache, n, columns) -> cache: n rows share each row of it, with empty columns of their own
    grow: Callable  # (cache, columns) -> cache: with so many more columns
    prepare: Callable | None = None  # (params, frozen) -> params, frozen: what a rollout needs done once
    routing: Callable | None = None  # (cache) -> [B S ...] experts chosen at each token (mixture models)


# ------------------------------------------------------------------------------------------------- what a sampler reads


class Rows(NamedTuple):
    """P prompts as drawn from a dataset, on the host. Prompts are padded on the left: they end in the same column.

    A prompt may be the beginning of an answer too: `past` says which of its tokens a policy chose, and how.
    """

    tokens: np.ndarray  # [P L] int32
    mask: np.ndarray  # [P L] bool: True on the prompt's own tokens
    number: np.ndarray  # [P] int32: place in the draw order; the sampler's key is made of it
    columns: list[dict]  # the dataset's columns, one dict a prompt
    cursor: int  # where the next draw starts
    requests: np.ndarray | None = None  # [R 2] (row, answer): which answers to draw; None: 0 .. n-1 to each row
    past: dict[str, np.ndarray] | None = None  # [P L] each, facts of the tokens: chosen, logp, temperature, version,
    # terminated, truncated
    began: np.ndarray | None = None  # [P] the step whose key draws the row; None: the present one


@struct.dataclass
class Sampling:
    """How to draw. Scalars hold for every row; arrays [P] hold prompt by prompt. None switches a setting off.

    In this order, as transformers does: bias, penalty, min_tokens, temperature, top_k, top_p, min_p.
    """

    temperature: Array | float = 1.0  # 0: the most likely token, its log-prob reported at temperature 1
    top_k: Array | int | None = None  # keep the k most likely tokens
    top_p: Array | float | None = None  # keep the likeliest tokens that hold this share
    min_p: Array | float | None = None  # keep tokens with p >= min_p * max p
    repetition_penalty: Array | float | None = (
        None  # logits of tokens seen before, prompt included: z/r, or z·r below 0
    )
    logit_bias: Array | None = None  # [V] or [P V] added to the logits
    min_tokens: Array | int | None = None  # no stop token before an answer has so many
    stop_strings: Array | None = None  # [states V] automaton that reads tokens: the next state, below 0: a stop
    n: int = struct.field(pytree_node=False, default=1)  # answers per prompt (G)
    max_tokens: int = struct.field(pytree_node=False, default=64)  # of an answer, its past included
    stop: tuple[int, ...] = struct.field(pytree_node=False, default=())  # token ids that end an answer (EOS)
    logp: Literal["policy", "drawn"] = struct.field(pytree_node=False, default="policy")  # at the temperature: of
    # the policy's distribution, which the trainer computes too, or of what all these settings made of it
    max_concurrent: int | None = struct.field(
        pytree_node=False, default=None
    )  # rows at a time, refilled; None: all at once
    stop_after: int | None = struct.field(pytree_node=False, default=None)  # stop when so many answers have ended


# -------------------------------------------------------------------------------------------------------------- doors


def trajectory_of_tokens(tokens, segments, chosen, logp, **fields) -> Trajectory:
    """Facts from whole token rows: the one place where the next-token shift happens.

    Args:
      tokens: [B S] ids. segments: [B S], 0 = padding. chosen: [B S] True on tokens the policy drew.
      logp: [B S] log-prob of each chosen token. fields: further [B S] facts about *chosen tokens*, shifted alike
      (`temperature`, `rewards`, `terminated` ...), and facts of rows (`group`, `scores`, `baseline`), kept as they are.

    Returns: T = S - 1 decisions; decision t chose tokens[:, t + 1] on seeing tokens[:, : t + 1].
    """
    tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    real = (segments > 0).astype(jnp.int32)
    starts = real * (segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
    count = jnp.cumsum(real, axis=1) - real
    positions = (count - jax.lax.cummax(starts * count, axis=1)) * real

    of_rows = ("group", "scores", "baseline")
    shifted = {name: value if name in of_rows else value[:, 1:] for name, value in fields.items()}
    return Trajectory(
        inputs=tokens[:, :-1],
        actions=tokens[:, 1:],
        logp=logp[:, 1:],
        mask=chosen[:, 1:] & inside,
        positions=positions[:, :-1],
        segments=jnp.where(inside, segments[:, :-1], 0),
        **shifted,
    )


def check_shapes(x: Trajectory | Batch) -> None:
    """Raise ValueError, naming the field, unless every [B T] field of `x` has the shape of its mask. Free under jit."""
    traj = x.traj if isinstance(x, Batch) else x
    B, T = traj.mask.shape
    expected = {"group": (B,), "baseline": (B,), "values": (B, T + 1), "scores": (B,)}
    for owner in {id(traj): traj, id(x): x}.values():
        for name, value in vars(owner).items():
            if value is None or name in ("traj", "coefficients", "dist", "extra"):
                continue
            want = expected.get(name, (B, T))
            if jnp.shape(value)[: len(want)] != want:
                owned = f"{type(owner).__name__}.{name}"
                raise ValueError(f"{owned} has shape {jnp.shape(value)}; with a mask of {(B, T)} it must start {want}")
