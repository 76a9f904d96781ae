"""What every method of compared or judged answers begins with: sums over answers, weights, metrics.

A batch of preferences is annotated before: `ref_logp` of both answers, zeros to do without a reference. Weights are
fixed over the whole optimizer batch (1/N, N the pairs in which anybody said anything), so micro-batches and shards are
plain sums. Rows are not packed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import preferences
from rljax.types import Objective, Pairs, Trajectory, Unpaired, check_shapes

PerRow = Float[Array, " B"]


class CompletionStats(NamedTuple):
    """B answers as the policy sees them. Sums are over the answer's own tokens."""

    logp: PerRow  # Σ_t w_t log π (w = 1, unless the method weighs tokens)
    ref_logp: PerRow | None  # Σ_t w_t log π_ref
    length: PerRow  # tokens, at least 1
    alignment: PerRow | None = None  # mean_t [log π - log Σ_v π²], where the policy gives Σ_v π²

    @property
    def ratio(self) -> PerRow:
        """Δ = log π/π_ref of the answer."""
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
    """B pairs of answers, and what `prepare` found out about the whole batch."""

    chosen: CompletionStats
    rejected: CompletionStats
    nll: PerRow  # -Σ_t log π(chosen), scaled: its mean over the pairs is the mean over all chosen tokens
    margin: PerRow | None
    extra: dict


def zero_masked(traj: Trajectory) -> Trajectory:
    """The trajectory with zeros (temperature: ones) at masked columns of what a policy or a loss may read."""
    check_shapes(traj)
    facts = {"logp": jnp.where(traj.mask, traj.logp, 0.0)}
    if traj.ref_logp is not None:
        facts["ref_logp"] = jnp.where(traj.mask, traj.ref_logp, 0.0)
    if traj.temperature is not None:
        facts["temperature"] = jnp.where(traj.mask, traj.temperature, 1.0)
    return traj.replace(**facts)


def has_tokens(traj: Trajectory) -> Bool[Array, " B"]:
    """Rows with a token of their own."""
    return traj.mask.any(axis=1)


def answers(output, traj: Trajectory, token_weight=1.0) -> CompletionStats:
    """What the policy says of the trajectory's rows. Masked columns take no part."""
    mask = traj.mask
    logp, squares = jnp.where(mask, output.logp, 0.0), output.sum_pi_squared
    return CompletionStats(
        logp=(token_weight * logp).sum(axis=1),
        ref_logp=None if traj.ref_logp is None else (token_weight * traj.ref_logp).sum(axis=1),
        length=jnp.maximum(mask.sum(axis=1), 1).astype(float),
        alignment=None if squares is None else preferences.alignment(logp, squares, mask),
    )


def uniform_row_weights(present: Bool[Array, " B"]) -> PerRow:
    """1/N for each of the N rows present."""
    return present / jnp.maximum(present.sum(), 1).astype(float)


def sum_and_count(values, rows) -> tuple:
    """(sum, count) of a metric [B] over the rows named."""
    return jnp.where(rows, values, 0.0).sum(), rows.sum().astype(float)


def entropy_metric(*seen) -> dict:
    """The token mean of the entropy over pairs (output, trajectory), if the policy gives it."""
    if any(output.entropy is None for output, _ in seen):
        return {}
    nats = sum(jnp.where(traj.mask, output.entropy, 0.0).sum() for output, traj in seen)
    return {"entropy": (nats, sum(traj.mask.sum() for _, traj in seen).astype(float))}


def uniform_token_weights(mask, other):
    """1 on each token of an answer. See `preferences.shared_length_weights` for another weighting."""
    return mask.astype(float)


def preference_objective(
    policy: Callable,
    term: Callable,
    reward: Callable,
    token_weights: Callable = uniform_token_weights,
    match: Callable | None = None,
) -> Objective:
    """Σ weight · term over a batch of `Pairs`.

    Args:
      policy: (params, frozen, trajectory) -> PolicyOutput.
      term: Compared -> [B], the loss of each pair.
      reward: Answers -> [B], the implicit reward that metrics show.
      token_weights: (mask [B T], mask of the other answer) -> [B T].
      match: (Compared, present [B]) -> {name: [B]} for `Compared.extra`: what needs the policy over the whole optimizer
        batch, for one more forward pass.
    """

    def look(params, frozen, batch):
        chosen, rejected = batch.chosen, batch.rejected
        outputs = policy(params, frozen, chosen), policy(params, frozen, rejected)
        own, other = token_weights(chosen.mask, rejected.mask), token_weights(rejected.mask, chosen.mask)
        nll = -jnp.where(chosen.mask, outputs[0].logp, 0.0).sum(axis=1) * batch.extra["nll_scale"]
        sides = answers(outputs[0], chosen, own), answers(outputs[1], rejected, other)
        entropy = entropy_metric((outputs[0], chosen), (outputs[1], rejected))
        return PairStats(*sides, nll=nll, margin=batch.margin, extra=batch.extra), entropy

    def prepare(params, frozen, batch: Pairs, key) -> Pairs:
        batch = batch.replace(chosen=zero_masked(batch.chosen), rejected=zero_masked(batch.rejected))
        present = has_tokens(batch.chosen) | has_tokens(batch.rejected)
        scale = jnp.maximum(present.sum(), 1) / jnp.maximum(batch.chosen.mask.sum(), 1).astype(float)
        extra = batch.extra | {"nll_scale": jnp.broadcast_to(scale, present.shape)}
        batch = batch.replace(weight=uniform_row_weights(present), extra=extra)
        if match is None:
            return batch
        pair, _ = look(params, frozen, batch)
        return batch.replace(extra=extra | match(pair, present))

    def loss(params, frozen, batch: Pairs):
        pair, entropy = look(params, frozen, batch)
        present, terms = has_tokens(batch.chosen) | has_tokens(batch.rejected), term(pair)
        better, worse = reward(pair.chosen), reward(pair.rejected)
        metrics = {
            "accuracy": sum_and_count(better > worse, present),
            "margin": sum_and_count(better - worse, present),
            "rewards/chosen": sum_and_count(better, present),
            "rewards/rejected": sum_and_count(worse, present),
            "logps/chosen": sum_and_count(pair.chosen.logp, present),
            "logps/rejected": sum_and_count(pair.rejected.logp, present),
        }
        return jnp.where(present, batch.weight * terms, 0.0).sum(), metrics | entropy

    return Objective(prepare, loss)


def unpaired_objective(policy: Callable, term: Callable, before: Callable, beta: float) -> Objective:
    """Σ weight · term over a batch of `Unpaired`.

    Args:
      policy: (params, frozen, trajectory) -> PolicyOutput.
      term: (Δ [B], Unpaired) -> [B], the loss of each answer.
      before: (look, Unpaired, present [B]) -> Unpaired: sets coefficients and weights (1/N so far) from the whole optimizer
        batch. `look` gives the `Answers` of a trajectory.
    """

    def prepare(params, frozen, batch: Unpaired, key) -> Unpaired:
        def look(traj):
            return answers(policy(params, frozen, traj), traj)

        mismatched = None if batch.mismatched is None else zero_masked(batch.mismatched)
        batch = batch.replace(traj=zero_masked(batch.traj), mismatched=mismatched)
        present = has_tokens(batch.traj)
        return before(look, batch.replace(weight=uniform_row_weights(present)), present)

    def loss(params, frozen, batch: Unpaired):
        output = policy(params, frozen, batch.traj)
        seen, present = answers(output, batch.traj), has_tokens(batch.traj)
        good, bad = present & batch.desirable, present & ~batch.desirable
        metrics = {
            "rewards/chosen": sum_and_count(beta * seen.log_ratio, good),
            "rewards/rejected": sum_and_count(beta * seen.log_ratio, bad),
            "logps/chosen": sum_and_count(seen.logp, good),
            "logps/rejected": sum_and_count(seen.logp, bad),
        }
        terms = jnp.where(present, batch.weight * term(seen.log_ratio, batch), 0.0)
        return terms.sum(), metrics | entropy_metric((output, batch.traj))

    return Objective(prepare, loss)


def log_coefficients(objective: Objective, *names: str) -> Objective:
    """The objective, showing those of the batch's coefficients too."""

    def loss(params, frozen, batch):
        value, metrics = objective.loss(params, frozen, batch)
        return value, metrics | {name: (batch.coefficients[name], jnp.ones(())) for name in names}

    return objective._replace(loss=loss)
