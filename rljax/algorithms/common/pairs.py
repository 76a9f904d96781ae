"""Building blocks of objectives over preferences: sums over completions, weights, metrics.

A batch of preferences is annotated first: `ref_logp` of all completions, zeros to do without a reference. Weights are
fixed over the whole optimizer batch (1/N, N the pairs that have a token), so that micro-batches and shards are plain
sums. Rows are not packed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import preferences
from rljax.ops.shapes import PerRow, PerToken, TokenMask
from rljax.types import (
    Objective,
    Pairs,
    Params,
    PolicyFn,
    PolicyOutput,
    ScoreFn,
    Trajectory,
    Unpaired,
    all_at_once,
    check_shapes,
    zero_masked,
)

SumAndCount = tuple[Float[Array, ""], Float[Array, ""]]


class CompletionStats(NamedTuple):
    """What the policy computes for B completions. Sums are over the completion's own tokens."""

    logp: PerRow  # Σ_t w_t log π (w = 1, unless the method weights tokens)
    ref_logp: PerRow | None  # Σ_t w_t log π_ref
    length: PerRow  # tokens, at least 1
    alignment: PerRow | None = None  # mean_t [log π - log Σ_v π²], if the policy returns Σ_v π²

    @property
    def log_ratio(self) -> PerRow:
        """Δ = log π/π_ref of the completion."""
        if self.ref_logp is None:
            raise ValueError("this method compares with a reference: fill ref_logp (with zeros to do without one)")
        return self.logp - self.ref_logp

    @property
    def mean_log_ratio(self) -> PerRow:
        return self.log_ratio / self.length

    @property
    def mean_logp(self) -> PerRow:
        return self.logp / self.length


class PairStats(NamedTuple):
    """What the policy computes for B pairs, and what `prepare` computed over the whole batch."""

    chosen: CompletionStats
    rejected: CompletionStats
    nll: PerRow  # -Σ_t log π(chosen), scaled: its mean over the pairs is the mean over all chosen tokens
    margin: PerRow | None
    extra: dict


PairTermFn = Callable[[PairStats], PerRow]  # the loss of each pair
CompletionFn = Callable[[CompletionStats], PerRow]  # a number for each completion: its implicit reward, say
TokenWeightsFn = Callable[[TokenMask, Bool[Array, "B T2"]], PerToken]  # (mask, mask of the other completion)
MatchFn = Callable[[PairStats, Bool[Array, " B"]], dict[str, PerRow]]  # (pairs, present) -> `PairStats.extra`
UnpairedTermFn = Callable[[PerRow, Unpaired], PerRow]  # (Δ, batch) -> the loss of each completion
# (evaluate: trajectory -> CompletionStats, batch, present) -> batch
UnpairedPrepareFn = Callable[[Callable[[Trajectory], CompletionStats], Unpaired, Bool[Array, " B"]], Unpaired]


def checked_zero_masked(traj: Trajectory) -> Trajectory:
    """`zero_masked` by the trajectory's own mask, after a check of its shapes."""
    check_shapes(traj)
    return zero_masked(traj, traj.mask)


def has_tokens(traj: Trajectory) -> Bool[Array, " B"]:
    """Rows with at least one token of the policy's own."""
    return traj.mask.any(axis=1)


def completion_stats(output: PolicyOutput, traj: Trajectory, token_weights: PerToken | float = 1.0) -> CompletionStats:
    """Sums over the rows of a trajectory. Masked columns are ignored."""
    mask = traj.mask
    logp = jnp.where(mask, output.logp, 0.0)
    squares = output.sum_pi_squared
    return CompletionStats(
        logp=(token_weights * logp).sum(axis=1),
        ref_logp=None if traj.ref_logp is None else (token_weights * traj.ref_logp).sum(axis=1),
        length=jnp.maximum(mask.sum(axis=1), 1).astype(float),
        alignment=None if squares is None else preferences.alignment(logp, squares, mask),
    )


def uniform_row_weights(present: Bool[Array, " B"]) -> PerRow:
    """1/N for each of the N rows present."""
    return present / jnp.maximum(present.sum(), 1).astype(float)


def sum_and_count(values: Float[Array, " B"] | Bool[Array, " B"], rows: Bool[Array, " B"]) -> SumAndCount:
    """A metric [B] as (sum, count) over the given rows."""
    return jnp.where(rows, values, 0.0).sum(), rows.sum().astype(float)


def entropy_metric(*evaluated: tuple[PolicyOutput, Trajectory]) -> dict[str, SumAndCount]:
    """The token mean of the entropy over pairs (output, trajectory), if the policy returns it."""
    if any(output.entropy is None for output, _ in evaluated):
        return {}
    nats = sum(jnp.where(traj.mask, output.entropy, 0.0).sum() for output, traj in evaluated)
    return {"entropy": (nats, sum(traj.mask.sum() for _, traj in evaluated).astype(float))}


def evaluate_both(
    evaluate: PolicyFn | ScoreFn, params: Params, frozen: Params, chosen: Trajectory, rejected: Trajectory
) -> tuple[Any, Any]:
    """What a policy or a reward model says of two completions; from one pass where they continue one prefix."""
    if chosen.prefix is None:
        return evaluate(params, frozen, chosen), evaluate(params, frozen, rejected)

    def interleave(x, y):
        return jnp.stack([x, y], axis=1).reshape(2 * len(x), *x.shape[1:])

    rows = jax.tree.map(interleave, chosen.replace(prefix=None), rejected.replace(prefix=None))
    output = evaluate(params, frozen, rows.replace(prefix=chosen.prefix))
    return jax.tree.map(lambda x: x[::2], output), jax.tree.map(lambda x: x[1::2], output)


def uniform_token_weights(mask: TokenMask, other: Bool[Array, "B T2"]) -> PerToken:
    """1 on each token of a completion. See `preferences.shared_length_weights` for other weights."""
    return mask.astype(float)


def preference_objective(
    policy: PolicyFn,
    term: PairTermFn,
    reward: CompletionFn,
    token_weights: TokenWeightsFn = uniform_token_weights,
    match: MatchFn | None = None,
    uses_margin: bool = False,
) -> Objective:
    """Σ weight · term over a batch of `Pairs`.

    Args:
      term: PairStats -> [B], the loss of each pair.
      reward: CompletionStats -> [B], the implicit reward, for the metrics.
      token_weights: (mask [B T], mask of the other completion) -> [B T].
      match: (PairStats, present [B]) -> {name: [B]} for `PairStats.extra`: what needs the policy over the whole
        optimizer batch, at the cost of one more forward pass.
      uses_margin: the term reads `Pairs.margin`. Others raise ValueError for pairs that have one: it would be ignored.
    """

    def evaluate_pair(params, frozen, batch):
        chosen = batch.chosen
        rejected = batch.rejected
        chosen_output, rejected_output = evaluate_both(policy, params, frozen, chosen, rejected)
        nll = -jnp.where(chosen.mask, chosen_output.logp, 0.0).sum(axis=1) * batch.extra["nll_scale"]
        pair = PairStats(
            chosen=completion_stats(chosen_output, chosen, token_weights(chosen.mask, rejected.mask)),
            rejected=completion_stats(rejected_output, rejected, token_weights(rejected.mask, chosen.mask)),
            nll=nll,
            margin=batch.margin,
            extra=batch.extra,
        )
        return pair, entropy_metric((chosen_output, chosen), (rejected_output, rejected))

    def prepare(params, frozen, batch: Pairs, key, map_rows=all_at_once) -> Pairs:
        if batch.margin is not None and not uses_margin:
            raise ValueError("this objective does not use Pairs.margin; legal: None. `odpo` and `reward_model` use it")
        batch = batch.replace(chosen=checked_zero_masked(batch.chosen), rejected=checked_zero_masked(batch.rejected))
        present = has_tokens(batch.chosen) | has_tokens(batch.rejected)
        scale = jnp.maximum(present.sum(), 1) / jnp.maximum(batch.chosen.mask.sum(), 1).astype(float)
        extra = batch.extra | {"nll_scale": jnp.broadcast_to(scale, present.shape)}
        batch = batch.replace(weight=uniform_row_weights(present), extra=extra)
        if match is None:
            return batch
        pair = map_rows(lambda rows: evaluate_pair(params, frozen, rows)[0], batch)
        return batch.replace(extra=extra | match(pair, present))

    def loss(params, frozen, batch: Pairs):
        pair, entropy = evaluate_pair(params, frozen, batch)
        present = has_tokens(batch.chosen) | has_tokens(batch.rejected)
        total = jnp.where(present, batch.weight * term(pair), 0.0).sum()
        return total, preference_metrics(pair, reward, present) | entropy

    return Objective(prepare, loss)


def preference_metrics(pair: PairStats, reward: CompletionFn, present: Bool[Array, " B"]) -> dict[str, tuple]:
    """(sum, count) over the pairs present: implicit rewards, log-probs, and how often the chosen one is preferred."""
    chosen_reward = reward(pair.chosen)
    rejected_reward = reward(pair.rejected)
    return {
        "accuracy": sum_and_count(chosen_reward > rejected_reward, present),
        "margin": sum_and_count(chosen_reward - rejected_reward, present),
        "rewards/chosen": sum_and_count(chosen_reward, present),
        "rewards/rejected": sum_and_count(rejected_reward, present),
        "logps/chosen": sum_and_count(pair.chosen.logp, present),
        "logps/rejected": sum_and_count(pair.rejected.logp, present),
    }


def unpaired_objective(
    policy: PolicyFn, term: UnpairedTermFn, prepare_batch: UnpairedPrepareFn, beta: float
) -> Objective:
    """Σ weight · term over a batch of `Unpaired`.

    Args:
      term: (Δ [B], Unpaired) -> [B], the loss of each completion.
      prepare_batch: (evaluate, Unpaired, present [B]) -> Unpaired: sets coefficients and weights (1/N until then) from
        the whole optimizer batch. `evaluate` gives the `CompletionStats` of a trajectory.
    """

    def prepare(params, frozen, batch: Unpaired, key, map_rows=all_at_once) -> Unpaired:
        def evaluate(traj):
            return map_rows(lambda rows: completion_stats(policy(params, frozen, rows), rows), traj)

        mismatched = None if batch.mismatched is None else checked_zero_masked(batch.mismatched)
        batch = batch.replace(traj=checked_zero_masked(batch.traj), mismatched=mismatched)
        present = has_tokens(batch.traj)
        return prepare_batch(evaluate, batch.replace(weight=uniform_row_weights(present)), present)

    def loss(params, frozen, batch: Unpaired):
        output = policy(params, frozen, batch.traj)
        stats = completion_stats(output, batch.traj)
        present = has_tokens(batch.traj)
        desirable = present & batch.desirable
        undesirable = present & ~batch.desirable
        metrics = {
            "rewards/chosen": sum_and_count(beta * stats.log_ratio, desirable),
            "rewards/rejected": sum_and_count(beta * stats.log_ratio, undesirable),
            "logps/chosen": sum_and_count(stats.logp, desirable),
            "logps/rejected": sum_and_count(stats.logp, undesirable),
        }
        terms = jnp.where(present, batch.weight * term(stats.log_ratio, batch), 0.0)
        return terms.sum(), metrics | entropy_metric((output, batch.traj))

    return Objective(prepare, loss)


def log_coefficients(objective: Objective, *names: str) -> Objective:
    """The objective with these coefficients of the batch among its metrics."""

    def loss(params, frozen, batch):
        value, metrics = objective.loss(params, frozen, batch)
        return value, metrics | {name: (batch.coefficients[name], jnp.ones(())) for name in names}

    return objective._replace(loss=loss)
