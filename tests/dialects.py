"""Where a peer computes something else than rljax: what turns our answer into theirs, and why ours differs.

Used by the tables of tests/golden only. Nothing here is a recommendation.
"""

import jax
import jax.numpy as jnp

# --------------------------------------------------------------------------------------------------------- preferences


def trl_float32_mean(share):
    """TRL averages booleans (accuracies) in float32 whatever the model's width."""
    return jnp.float32(share)


def trl_weight_by_log_probs(loss_type: str, weight: float) -> float:
    """TRL's sft term is a cross-entropy of the logits, apart from the log-probs that the other terms of DPO share: the
    gradient by those does not see it."""
    return 0.0 if loss_type == "sft" else weight


def openrlhf_sequence_mean(weights):
    """OpenRLHF adds 1e-8 to the tokens of a row, and its mean over the rows counts those without tokens."""

    def dialect(mask, segments=None):
        n, said = mask.sum(axis=1, keepdims=True), mask.any(axis=1).mean()
        return weights(mask, segments) * n / (n + 1e-8) * said

    return dialect


# ---------------------------------------------------------------------------------------------------------- estimation


def bounded_value(estimate, bound: float):
    """verl and OpenRLHF clamp KL estimates to ±10, and give no gradient beyond: not the estimator any more."""
    return jnp.clip(estimate, -bound, bound)


def bounded_value_only(estimate, bound: float):
    """verl's "k3+": the value clamped, the gradient of k2 as it is."""
    return estimate + jax.lax.stop_gradient(jnp.clip(estimate, -bound, bound) - estimate)


def unbounded_exponent(estimate, logp, ref_logp):
    """tunix and TRL take e^-d without a bound, which overflows in float32; ours is clamped at ±20."""
    d = logp - ref_logp
    return jnp.where(jnp.abs(d) > 20.0, jnp.exp(-d) - 1.0 + d, estimate)


def uncapped_overlong(punishment, lengths, longest: int, cache: int):
    """verl and ms-swift let the overlong punishment grow beyond -1 for answers that exceed the limit; DAPO caps it."""
    return punishment - jnp.maximum(lengths - longest, 0) / cache


def openrlhf_stop_properly(coefficient: float) -> dict[str, float]:
    """OpenRLHF's one coefficient means two things: a factor if it is >= 0, else the reward put in place."""
    return {"scale": coefficient} if coefficient >= 0 else {"scale": 0.0, "offset": coefficient}


def next_column_rewards(rewards, gamma, next_values, following):
    """rlax is told V of the next column, masked or not; we take V of the next decision. The difference, as reward."""
    return rewards + gamma * (next_values - following)


def carried_back(errors, mask):
    """rlax reports at a masked column the error of the next decision; ours is 0 there."""
    kept, out = jnp.zeros_like(errors[0]), []
    for error, here in zip(errors[::-1], mask[::-1], strict=True):
        kept = jnp.where(here, error, kept)
        out.append(kept)
    return jnp.stack(out[::-1])


def verl_rows_without_decisions(ours, rows, value: float, reduce: str = "mean"):
    """verl counts rows without decisions in its means and extrema, as log-prob 0; ours are over the other rows."""
    if reduce == "mean":
        return jnp.where(rows, ours, value).mean()
    extreme = {"max": jnp.maximum, "min": jnp.minimum}[reduce]
    return jnp.where(rows.all(), ours, extreme(ours, value))


def verl_january_sum_norm(weights, mask):
    """verl of January forgets to divide the length-normalised sum by the rows (its PR 5417)."""
    return weights * mask.any(axis=1).sum()


def verl_row_mean(x, mask):
    """verl divides the sum of a row by n + 1e-8."""
    n = mask.sum(axis=1, keepdims=True)
    return x * n / (n + 1e-8)


def verl_mean(x, mask):
    """verl divides the sum of all tokens by their number + 1e-8."""
    return x * mask.sum() / (mask.sum() + 1e-8)


def verl_token_sum(weights, mask):
    """verl's token-sum divides by nothing: the step grows with the batch."""
    return weights * mask.sum()


def verl_share(weights, own: float, whole: float, ranks: int):
    """What one of several ranks of verl adds to the loss: the divisor is the whole batch's, times the ranks that DDP
    averages over. Ours are weights of the whole batch to begin with."""
    return weights * own / whole * ranks


def tunix_divided_by_all_rows(weights, mask):
    """tunix's sequence-mean-token-sum-norm divides by the rows of the batch, empty ones too."""
    return weights * mask.any(axis=1).mean()


def score_one_late(mask):
    """TRL's PPO puts the score one column after the last token, and keeps the value of that column, if there is one."""
    return mask | jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1] | (jnp.arange(mask.shape[1]) == 0)[None]


def verl_truncated(mask, width: int):
    """verl knows no flag: a row is cut if it is as long as the batch is wide."""
    full = mask.sum(axis=1, keepdims=True) == width
    return mask & full
