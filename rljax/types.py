"""The shared types: every pytree and every bundle of functions that the packages hand to one another.

**B rows, T decisions, time last; column t of every field refers to the same decision.** The next-token shift happens
once, in `trajectory_of_tokens`; no other code shifts. The dataclasses are frozen: the loop fills fields with
`replace`. A field that an algorithm does not need is None.

Letters: B rows, T decisions, S tokens (S = T + 1), P prompts, G completions per prompt (B = P·G), L prompt columns,
V vocabulary, D width, K reward components.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
Params = Any  # a nested dict of arrays
Metrics = dict[str, Array]  # name -> value of each decision [B T]


# ---------------------------------------------------------------------------------------- trajectories and batches


@struct.dataclass
class SharedPrefix:
    """P prefixes of L columns without a decision. The first serves the first B/P rows, the next the next B/P ..., so a
    prompt is computed once for all its completions.
    """

    inputs: Array  # [P L]
    positions: Array  # [P L]
    segments: Array  # [P L] the segment of the rows that continue it; 0 = padding
    routing: Array | None = None  # [P L M k]


@struct.dataclass
class Trajectory:
    """What happened: B rows of T decisions.

    A row is a prompt and its completion. Inside a segment `actions[:, t] == inputs[:, t + 1]`; the last chosen token
    stands only in `actions`. Scores and rewards are NaN where a verifier failed (never silently 0).
    """

    inputs: Array  # [B T ...] token ids (or observations) the policy saw at t
    actions: Array  # [B T ...] what it chose
    logp: Array  # [B T] log-prob of that choice under the behavior policy, which made it
    mask: Array  # [B T] True where the policy itself chose: not prompt, tool output or padding
    positions: Array | None = None  # [B T] position of the input in its segment, from 0
    segments: Array | None = None  # [B T] 0 = padding; several per row only after packing (any ids)
    context: Array | None = None  # [B T] the segment of the row that stands before this one, seen by it too; 0 = none
    temperature: Array | None = None  # [B T] at which it was drawn; the policy rescales its logits by it
    prefix: SharedPrefix | None = None  # what stands before column 0, where neighboring rows share it
    support: Array | None = None  # [B T k] int32: the tokens it was drawn from (top-k, top-p ...), -1 = no token; the
    # policy renormalizes over them. None: the whole vocabulary
    group: Array | None = None  # [B] rows that share a prompt or start state (ids, any order); [B T] after packing
    scores: Array | None = None  # [B K] each verifier's raw result; NaN = it failed or does not apply
    reward_weights: Array | None = None  # [B K] of each score in the reward; 0 = recorded only
    next_inputs: Array | None = None  # [B T ...] the environment's next observation, before any reset
    rewards: Array | None = None  # [B T] per decision; an outcome reward stands on the last chosen token
    step_ends: Array | None = None  # [B T] bool: ends of reasoning steps (process rewards)
    baseline: Array | None = None  # [B] reward of a companion completion (ReMax's greedy one)
    old_logp: Array | None = None  # [B T] the trainer's own recomputation before the update; None means `logp`
    ref_logp: Array | None = None  # [B T] under the frozen reference
    teacher_logp: Array | None = None  # [B T] under the teacher of a distillation
    values: Array | None = None  # [B T+1]
    final_values: Array | None = None  # [B T] V(last observation), used where truncated
    terminated: Array | None = None  # [B T] bool: this decision ended the episode (EOS)
    truncated: Array | None = None  # [B T] bool: the episode was cut after this decision (length)
    dist: Any = None  # [B T ...] parameters of the old distribution, where a method needs all of it
    routing: Array | None = None  # [B T M k] experts chosen at sampling time in each mixture layer, for replay
    version: Array | None = None  # [B T] which policy version chose it
    sum_pi_squared: Array | None = None  # [B T] Σ_v π_old(v)², for baselines that are weighted by it
    entropy: Array | None = None  # [B T] of the policy at each decision, nats; for the samples of the report


@struct.dataclass
class Batch:
    """What to learn from a trajectory. Filters shrink `mask`; `traj` and `traj.mask` stay as they are."""

    traj: Trajectory
    advantages: Array  # [B T]
    mask: Array  # [B T] starts as traj.mask
    returns: Array | None = None  # [B T] targets of the values
    weight: Array | None = None  # [B T] coefficient of each term in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B T] each: what `prepare` computed for `loss`


@struct.dataclass
class Pairs:
    """B comparisons of two completions of one prompt: the batch of DPO and of reward models.

    Chosen and rejected are separate fields, so that any cut of the batch keeps pairs. Their widths may differ, but
    where they have a `prefix`: it is the same for both.
    """

    chosen: Trajectory  # [B T]
    rejected: Trajectory  # [B T']
    margin: Array | None = None  # [B] by how much the chosen one is better, if it was rated
    gold: Trajectory | None = None  # [B T''] a third completion, to be imitated (TPO)
    weight: Array | None = None  # [B] coefficient of each pair in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B] each: what `prepare` computed for `loss`


@struct.dataclass
class Unpaired:
    """B completions, each labeled desirable or undesirable by itself: the batch of KTO and BCO."""

    traj: Trajectory  # [B T]
    desirable: Array  # [B] bool
    mismatched: Trajectory | None = None  # [B T'] each prompt with another prompt's completion (KTO's z)
    weight: Array | None = None  # [B] coefficient of each completion in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B] each: what `prepare` computed for `loss`


@struct.dataclass
class Distillation:
    """B rows of completions on which a student learns the predictions of a teacher: the batch of distillation.

    The teacher may read more before the same completions (feedback, a demonstration). Then `teacher_view` holds them as
    the teacher sees them: the k-th decision of a row is the k-th decision of that row of `traj`, at another column.
    """

    traj: Trajectory  # [B T] as the student sees them
    teacher_view: Trajectory | None = None  # [B T'] the same completions as the teacher sees them; None: `traj`
    weight: Array | None = None  # [B T] coefficient of each decision in the sum; set once per optimizer step
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # traced scalars
    extra: dict[str, Array] = struct.field(default_factory=dict)  # [B T] each: what `prepare` computed for `loss`


@struct.dataclass
class PolicyOutput:
    """What the policy being trained computes for the same decisions."""

    logp: Array  # [B T]
    entropy: Array | None = None  # [B T] nats
    values: Array | None = None  # [B T]
    kl: Array | None = None  # [B T] exact KL to `traj.dist`, in nats
    sum_pi_squared: Array | None = None  # [B T] Σ_v π(v)²


@struct.dataclass
class Transition:
    """One step of an environment, or n of them, for replay: the batch of Q-learning (any leading axes)."""

    observation: Array
    action: Array
    reward: Array  # of n steps: discounted, summed
    next_observation: Array  # the last one of the episode where it ended
    discount: Array  # of the value of next_observation: γ^n; 0 where terminated, not where truncated
    weight: Array | None = None  # 0 where there is no transition, else 1 (None: all 1); from `prepare` on the
    # coefficient of each term in the sum


@struct.dataclass
class TrainState:
    """Everything a resumed run needs. `step` counts iterations of the experiment's loop, not optimizer updates."""

    step: Array  # scalar int32
    params: Params  # trained leaves only
    opt_state: Any
    key: Array  # PRNG key, split by every update
    frozen: Params = struct.field(default_factory=dict)  # LoRA base, reference: neither donated nor differentiated
    cursor: Array = 0  # data position: prompts drawn so far
    coefficients: dict[str, Array] = struct.field(default_factory=dict)  # KL and entropy coefficients ...
    extra: Any = None  # replay buffer, environment state, target network, running means


# ------------------------------------------------------------------------------------- functions and bundles of them

# What a policy computes for a trajectory: (params, frozen, trajectory) -> PolicyOutput.
PolicyFn = Callable[[Params, Params, Trajectory], PolicyOutput]
# A number for each row, as a reward model gives it: (params, frozen, trajectory) -> [B].
ScoreFn = Callable[[Params, Params, Trajectory], Array]
# What a student and its teacher say of each decision: (params, frozen, batch, divergence) -> TokenComparison [B T].
CompareFn = Callable[[Params, Params, Distillation, Callable], Any]
# What fills fields of a trajectory by forward passes: (state, trajectory) -> trajectory.
AnnotateFn = Callable[[TrainState, Trajectory], Trajectory]
# KL(old ‖ new) of each decision: (params, old_params, frozen, trajectory) -> [B T].
DivergenceFn = Callable[[Params, Params, Params, Trajectory], Array]
# A verifier: (completion, **dataset columns) -> number, or None where it does not apply.
RewardFn = Callable[..., float | None]
# Advantages of the whole rollout batch (groups, episodes): (trajectory, coefficients) -> Batch.
CreditFn = Callable[[Trajectory, dict[str, Array]], Batch]
# Rows [B] of groups whose completions differ, where a method learns from differences only: (trajectory) -> bool [B].
SignalFn = Callable[[Trajectory], Array]
# The loss of each decision, unreduced: (output, batch) -> (terms [B T], metrics).
LossFn = Callable[[PolicyOutput, Batch], tuple[Array, Metrics]]
# The coefficient of each decision in the sum over the whole optimizer batch: (mask, segments, group) -> [B T]; group is
# [B], or [B T] where rows are packed. One of `ops.weights`, whose names are those of verl's `loss_agg_mode`.
WeightsFn = Callable[[Array, Array | None, Array | None], Array]
# What needs the current policy over the whole optimizer batch, without gradient: (output, batch, key) -> Batch.
PrepareFn = Callable[[PolicyOutput, Batch, Array], Batch]
# The same for any kind of batch: (params, frozen, batch, key) -> batch, with the weights set.
MapRowsFn = Callable[[Callable[[Any], Any], Any], Any]  # (f, rows) -> f(rows), computed a piece at a time
ObjectivePrepareFn = Callable[[Params, Params, Any, Array, MapRowsFn], Any]  # a forward pass goes through the MapRowsFn
# (params, frozen, batch) -> (sum, metrics {name: (sum, count)}); of names in *_max and *_min the extremum is taken.
ObjectiveLossFn = Callable[[Params, Params, Any], tuple[Array, dict[str, tuple[Array, Array]]]]


def all_at_once(f: Callable[[Any], Any], rows: Any) -> Any:
    """f(rows): the `MapRowsFn` that cuts nothing."""
    return f(rows)


class Algorithm(NamedTuple):
    """One paper, as pure functions. A variant is an argument, a wrapper or a `_replace`."""

    credit: CreditFn
    loss: LossFn
    weights: WeightsFn
    needs: tuple[str, ...] = ()  # Trajectory fields that must be annotated; wrappers add theirs
    prepare: PrepareFn | None = None  # called before the optimizer batch is cut into micro-batches; None: identity
    group_signal: SignalFn | None = None  # which groups teach something; None: every completion does
    least_group: int = 1  # completions of a prompt: with fewer nothing is learned, or nothing is the baseline
    one_update: bool = False  # one update of a rollout: no ratio corrects for policies after the one that sampled
    whole_groups: bool = False  # `prepare` compares the rows of a group: one minibatch, rows that are not packed
    # What advantages are made of. "rewards": sums of them, to which a term may be added (`kl_in_reward`); "correct":
    # whether completions are correct, or rewards of 0 and 1; "steps": rewards where steps end; "scores": each by itself
    reads: Literal["rewards", "correct", "steps", "scores"] = "rewards"
    # What makes samples of another policy than π_old right. "weights": π_old/π_sampler on advantages (`truncate_is`);
    # "itself": its own loss or credit, or it is right for any samples; "never": nothing that is offered here
    off_policy: Literal["weights", "itself", "never"] = "weights"


class Objective(NamedTuple):
    """All that `update` needs to know of a method."""

    prepare: ObjectivePrepareFn
    loss: ObjectiveLossFn
    state: tuple[str, ...] = ()  # coefficients that `prepare` updates: TrainState carries them from update to update


class LM(NamedTuple):
    """The functions of a language model that a sampler uses."""

    init_cache: Callable  # (rows, length) -> cache
    forward: Callable  # (params, frozen, tokens, positions, segments, cache) -> (hidden, cache)
    logits: Callable  # (params, frozen, hidden) -> [.. V]
    gather: Callable  # (cache, rows) -> cache: only those rows
    scatter: Callable  # (cache, rows, other) -> cache: refill finished slots
    fork: Callable  # (cache, n, columns) -> cache: n rows share each row, with empty columns of their own
    grow: Callable  # (cache, columns) -> cache with that many more columns
    crop: Callable  # (cache, length [B]) -> cache: of each row only that many columns, the others are free again
    prepare: Callable | None = None  # (params, frozen) -> params, frozen: done once per rollout
    routing: Callable | None = None  # (cache) -> [B S ...] experts chosen at each token (mixture models)
    row_shards: int = 1  # devices that the rows of a cache are sharded over


# --------------------------------------------------------------------------------------------- inputs of the sampler


class Resume(NamedTuple):
    """Completions to go on with: which, and what is known of the tokens that were sampled earlier."""

    requests: np.ndarray  # [R 2] (row, completion): which completions to sample
    facts: dict[str, np.ndarray] | None = None  # [P L] each: chosen (the token was sampled), logp, temperature,
    # version, terminated, truncated, and support [P L k] if it is kept; None: all tokens are prompts
    start_step: np.ndarray | None = None  # [P] the step whose key samples the row; None: the present one


class PromptBatch(NamedTuple):
    """P prompts as drawn from a dataset, on the host. Prompts are padded on the left: they end in the same column.

    A prompt may hold the beginning of a completion too: `resume` says which of its tokens were sampled, and how.
    """

    tokens: np.ndarray  # [P L] int32
    mask: np.ndarray  # [P L] bool: True on the prompt's own tokens
    number: np.ndarray  # [P] int32: number in the draw order, from which the sampler's key is derived
    columns: list[dict]  # the dataset's columns, one dict a prompt
    cursor: int  # where the next draw starts
    resume: Resume | None = None  # None: completions 0 .. n-1 of each row, from their first token
    shaped: list[dict] | None = None  # the columns with the texts that the prompts were made of: templates filled in,
    # texts as messages; None: the columns themselves

    @property
    def as_read(self) -> list[dict]:
        """The rows as the policy's prompts were made of them; what judges a conversation reads these."""
        return self.columns if self.shaped is None else self.shaped


class Turn(NamedTuple):
    """What the policy wrote in one turn of a conversation, on the host."""

    row: int  # which conversation: row of the batch, 0 .. B-1
    tokens: list[int]  # the sampled ids, the stop token included
    terminated: bool  # it met a stop token or stop string; False: it reached max_tokens or the end of the context


class Observation(NamedTuple):
    """What the environment answers to a turn."""

    tokens: list[int]  # appended after the turn, not chosen by the policy: a tool's reply, the next turn's header
    reward: float  # of the turn; NaN = it could not be judged
    terminated: bool = False  # the task is over; nothing is appended then
    truncated: bool = False  # cut (a deadline, a limit of turns): over, but not an end of the task


# Answers to the turns that are complete, in their order; called on the host, a few conversations at a time.
RespondFn = Callable[[Sequence[Turn]], Sequence[Observation]]


@struct.dataclass
class Sampling:
    """How to sample. Scalars hold for every row; arrays [P] hold one value per prompt. None turns a setting off.

    Applied in this order, as in transformers: bias, penalty, min_tokens, temperature, top_k, top_p, min_p.
    """

    temperature: Array | float = 1.0  # 0: the most likely token, its log-prob reported at temperature 1
    top_k: Array | int | None = None  # keep the k most likely tokens
    top_p: Array | float | None = None  # keep the most likely tokens whose probabilities sum to p
    min_p: Array | float | None = None  # keep tokens with p >= min_p * max p
    repetition_penalty: Array | float | None = (
        None  # logits of tokens seen before, prompt included: z/r, or z·r below 0
    )
    logit_bias: Array | None = None  # [V] or [P V] added to the logits
    min_tokens: Array | int | None = None  # no stop token before a completion has this many
    stop_strings: Array | None = None  # [states V] automaton over tokens: the next state; below 0: stop
    n: int = struct.field(pytree_node=False, default=1)  # completions per prompt (G)
    max_tokens: int = struct.field(pytree_node=False, default=64)  # of a completion, what was sampled earlier included
    stop: tuple[int, ...] = struct.field(pytree_node=False, default=())  # token ids that end a completion (EOS)
    support: int | None = struct.field(pytree_node=False, default=None)  # k: draw from at most the k most likely tokens
    # that the settings leave, and keep their ids in the trajectory: sampler and trainer renormalize over them
    logp: Literal["policy", "drawn"] | None = struct.field(pytree_node=False, default=None)  # "policy": of the policy's
    # distribution at the temperature; "drawn": of the distribution after all these settings. None: where the two are
    # one, because no setting but the temperature changes the distribution or because `support` is kept; else refused
    max_concurrent: int | None = struct.field(pytree_node=False, default=None)  # rows at a time, refilled; None: all
    stop_after: int | None = struct.field(pytree_node=False, default=None)  # stop when this many completions have ended


class ToolCall(NamedTuple):
    """A call of a tool as a model wrote it."""

    name: str
    arguments: dict[str, Any]  # by name; under "" the text of a format whose arguments have no names
    problem: str = ""  # why it does not parse; "" where it does


# ------------------------------------------------------------------------------------------- building and checking


def trajectory_of_tokens(tokens, segments, chosen, logp, **fields) -> Trajectory:
    """A trajectory from whole rows of tokens: the one place where the next-token shift happens.

    Args:
      tokens: [B S] ids. segments: [B S], 0 = padding. chosen: [B S] True on tokens the policy drew.
      logp: [B S] log-prob of each chosen token. fields: further [B S] arrays about *chosen tokens*, shifted as
      these are (`temperature`, `rewards`, `terminated` ...), and arrays about rows (`group`, `scores`, `baseline`).

    Returns: T = S - 1 decisions; decision t chose tokens[:, t + 1] after tokens[:, : t + 1].
    """
    tokens = jnp.asarray(tokens)
    segments = jnp.asarray(segments)
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    real = (segments > 0).astype(jnp.int32)
    starts = real * (segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
    count = jnp.cumsum(real, axis=1) - real
    positions = (count - jax.lax.cummax(starts * count, axis=1)) * real

    of_rows = ("group", "scores", "reward_weights", "baseline")
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
    expected = {"group": (B,), "baseline": (B,), "values": (B, T + 1), "scores": (B,), "reward_weights": (B,)}
    for owner in {id(traj): traj, id(x): x}.values():
        for name, value in vars(owner).items():
            if value is None or name in ("traj", "prefix", "coefficients", "dist", "extra"):
                continue
            if name == "group" and jnp.shape(value) == (B, T):  # of packed rows
                continue
            want = expected.get(name, (B, T))
            if jnp.shape(value)[: len(want)] != want:
                owned = f"{type(owner).__name__}.{name}"
                raise ValueError(f"{owned} has shape {jnp.shape(value)}; with a mask of {(B, T)} it must start {want}")


def zero_masked(traj: Trajectory, mask: Array) -> Trajectory:
    """The trajectory with zeros (temperature and dist: ones) where `mask` [B T] is False, in every number that a loss
    may read. There an exp of garbage would poison the gradient even if its value is dropped later.
    """
    names = ("logp", "old_logp", "ref_logp", "teacher_logp", "rewards", "final_values", "sum_pi_squared")
    given = {name: getattr(traj, name) for name in names if getattr(traj, name) is not None}
    fields = {name: jnp.where(mask, value, 0.0) for name, value in given.items()}
    if traj.temperature is not None:
        fields["temperature"] = jnp.where(mask, traj.temperature, 1.0)
    if traj.values is not None:
        fields["values"] = jnp.where(jnp.pad(mask, ((0, 0), (0, 1))), traj.values, 0.0)
    if traj.dist is not None:
        fields["dist"] = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(mask, range(2, x.ndim)), x, 1.0), traj.dist)
    return traj.replace(**fields)
