"""Where a peer computes something else than rljax: what turns our answer into theirs, and why ours differs.

Used by the tables of tests/golden and tests/replay only. Nothing here is a recommendation.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rljax.algorithms.bco import bco
from rljax.algorithms.common.credit import old_policy_logp
from rljax.algorithms.common.wrappers import with_entropy, with_prepare
from rljax.algorithms.nash_md import nash_md
from rljax.ops import groups, preferences, statistics
from rljax.ops.ratios import sequence_geometric_mean
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Objective, PolicyFn, all_at_once

# --------------------------------------------------------------------------------------------------------- preferences


def trl_float32_mean(share):
    """TRL averages booleans (accuracies) in float32 whatever the model's width."""
    return jnp.float32(share)


def trl_alpha_divergence(coefficient: float) -> Callable:
    """TRL's f_alpha_divergence_coef is 1 - α of f-DPO (arXiv:2309.16240): its slope is (u^{c-1} - 1)/(c - 1)."""
    return partial(preferences.alpha_divergence, alpha=1.0 - coefficient)


def trl_bco_of_one_class(policy: PolicyFn, beta: float) -> Objective:
    """TRL's δ is the running mean of all rewards, so that the larger class weighs more; BCO's is the mean of the means
    of the two classes. Its δ is found here as if all completions were of one class."""
    objective = bco(policy, beta)

    def prepare(params, frozen, batch, key, map_rows=all_at_once):
        one_class = batch.replace(desirable=jnp.ones_like(batch.desirable))
        return objective.prepare(params, frozen, one_class, key, map_rows).replace(desirable=batch.desirable)

    return objective._replace(prepare=prepare)


def trl_weight_by_log_probs(loss_type: str, weight: float) -> float:
    """TRL's sft term is a cross-entropy of the logits, apart from the log-probs that the other terms of DPO share: the
    gradient by those does not see it."""
    return 0.0 if loss_type == "sft" else weight


def trl_nash_md_of_single_tokens(beta: float) -> Algorithm:
    """TRL's Nash-MD multiplies the log ratio of each token with the log-prob of that token alone; the paper's payoff
    holds the log ratio of the completion, which is what its KL differentiates to."""
    algorithm = nash_md(0.0)

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        log_ratio = jax.lax.stop_gradient(output.logp - batch.traj.ref_logp)
        return terms + beta * log_ratio * output.logp, metrics

    return algorithm._replace(loss=loss)


def openrlhf_sequence_mean(weights):
    """OpenRLHF adds 1e-8 to the tokens of a row, and its mean over the rows counts those without tokens."""

    def dialect(mask, segments=None, group=None):
        n, said = mask.sum(axis=1, keepdims=True), mask.any(axis=1).astype(float).mean()
        return weights(mask, segments, group) * n / (n + 1e-8) * said

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


def verl_whitened(ours, x, mask):
    """verl and tunix add 1e-8 to the number of tokens when they whiten x, in the mean and in the variance."""
    n, mean, var = mask.sum(), statistics.masked_mean(x, mask), statistics.masked_var(x, mask)
    shift = mean * 1e-8 / (n + 1e-8)
    theirs = (var + n / (n - 1) * shift**2) * n / (n + 1e-8)
    return (ours * jnp.sqrt(var + 1e-8) + shift) / jnp.sqrt(theirs + 1e-8)


def verl_share(weights, own: float, whole: float, ranks: int):
    """What one of several ranks of verl adds to the loss: the divisor is the whole batch's, times the ranks that DDP
    averages over. Ours are weights of the whole batch to begin with."""
    return weights * own / whole * ranks


def score_one_late(mask):
    """TRL's PPO puts the score one column after the last token, and keeps the value of that column, if there is one."""
    return mask | jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1] | (jnp.arange(mask.shape[1]) == 0)[None]


def verl_truncated(mask, width: int):
    """verl knows no flag: a row is cut if it is as long as the batch is wide."""
    full = mask.sum(axis=1, keepdims=True) == width
    return mask & full


# ------------------------------------------------------------------------------------------ advantages, policy losses


def verl_counted(mask, rewards, width: int):
    """verl counts a row without tokens in its group, with the reward that stands on its padding; ours is no row.
    (mask, rewards) in which such a row has one decision."""
    empty, first = ~mask.any(axis=1, keepdims=True), (jnp.arange(mask.shape[1]) == 0)[None]
    total = rewards[:, :width].sum(axis=1, keepdims=True)
    return mask | (empty & first), jnp.where(empty, jnp.where(first, total, 0.0), rewards)


def lone(group):
    """Rows alone in their group."""
    return (group[:, None] == group[None, :]).sum(axis=1) == 1


def verl_lone_rows(advantages, rewards, group, epsilon: float = 0.0):
    """verl takes mean 0 and std 1 for a group of one, which keeps its raw reward; in ours it has advantage 0."""
    return jnp.where(lone(group)[:, None], (rewards / (1.0 + epsilon))[:, None], advantages)


def verl_gpg_scale(rewards, group):
    """verl's α is rows over rows with a reward that is not 0; ours, the paper's, counts groups whose rewards differ."""
    groups = [rewards[group == g] for g in jnp.unique(group)]
    ours = len(groups) / max(sum(bool((x != x[0]).any()) for x in groups), 1)
    return len(rewards) / max(int((rewards != 0).sum()), 1) / ours


def verl_floored(advantages, std, rewards, group, epsilon: float):
    """verl's vectorised GRPO takes the root of max(var, ε) before it adds ε, and var is a difference of float32 sums,
    in which close rewards lose most digits."""
    same, x = (group[:, None] == group[None, :]).astype(jnp.float32), rewards.astype(jnp.float32)
    n = same.sum(axis=1)
    var = (same @ (x * x) - (same @ x) * (same @ x) / n) / jnp.maximum(n - 1.0, 1.0)
    return advantages * ((std + epsilon) / (jnp.sqrt(jnp.maximum(var, epsilon)) + epsilon))[:, None]


def runs_as_rows(x, mask):
    """verl's REINFORCE++ of January forgets at a hole what follows it, as if each run of tokens were a row of its own.
    [B T] -> [B·T T], run k of row i in row i·T + k; the mask says which columns are its."""
    starts = mask & ~jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    number = jnp.cumsum(starts, axis=1) - 1
    own = mask[:, None, :] & (number[:, None, :] == jnp.arange(mask.shape[1])[None, :, None])
    rows = jnp.where(own, x[:, None, :], 0.0)
    return rows.reshape(-1, x.shape[1]), own.reshape(-1, x.shape[1])


def verl_token_baseline(baseline, returns, weight, group, mask, epsilon: float):
    """verl adds ε to the sum of the weights, and lets a row alone in its column be its own baseline, unless it is alone
    in its group; ours gives none to either."""
    same = (group[:, None] == group[None, :]).astype(returns.dtype)
    total, here = same @ weight, same @ mask.astype(returns.dtype)
    baseline = jnp.where(here < 2, returns, baseline) * total / (total + epsilon)
    return jnp.where(lone(group)[:, None], 0.0, baseline)


def verl_geometric_mean(terms, advantages, mask):
    """verl's GMPO divides both sums over a row by n + 1e-8. -Â w is given, -(Â s) w^s returned, s = n / (n + 1e-8)."""
    share = verl_row_mean(jnp.ones_like(terms), mask)
    weight = jnp.where(advantages != 0, -terms / jnp.where(advantages != 0, advantages, 1.0), 1.0)
    return -advantages * share * weight**share


def divided_by_all_rows(weights):
    """TRL and ms-swift, and verl's GMPO, count rows without tokens in the mean over the rows."""

    def dialect(mask, segments=None, group=None):
        return weights(mask, segments, group) * mask.any(axis=1).astype(float).mean()

    return dialect


def divided_by_tokens_before(mask):
    """ms-swift divides by the tokens before it filters overlong answers."""

    def dialect(kept, segments=None, group=None):
        return kept / jnp.maximum(mask.sum(), 1)

    return dialect


def sampler_of(old_logp, weight, mask):
    """The sampler's log-probs under which π_old/π_sampler is a recorded weight."""
    return jnp.where(mask, old_logp - jnp.log(jnp.where(mask, weight, 1.0)), 0.0)


def trl_row_mean(x, mask, empty: float):
    """TRL's means of numbers that a row's tokens share count rows without tokens, as if their ratio were 1."""
    return jnp.where(mask.any(axis=1), x, empty).mean()


def trl_empty_rows(old_logp, advantages, mask, term):
    """TRL's RLOO and GMPO add, without gradient, the term of a row without tokens: its log-prob is 0."""
    return jnp.where(mask.any(axis=1), 0.0, term(jnp.exp(-old_logp), advantages)).mean()


def trl_float32_share(share: float, entropy, mask) -> float:
    """TRL finds the quantile in float32: a token that stands on it is left out where rounding lifted the quantile."""
    known = jnp.sort(entropy[mask])
    place = (1.0 - share) * (len(known) - 1)
    nearest = round(place)
    lifted = abs(place - nearest) < 1e-6 and jnp.float32(known[nearest]) > known[nearest]
    return share - 1e-9 if lifted else share


def trl_alone(advantages, judged, group):
    """TRL gives no advantage to a row without another judged one in its group; ours keeps its reward (RLOO)."""
    others = ((group[:, None] == group[None, :]) & judged[None, :]).sum(axis=1) - judged
    return jnp.where(others > 0, advantages, 0.0), judged & (others > 0)


def at_least(weight, low):
    """TRL and OpenRLHF bound truncated weights from below too."""
    return weight if low is None else jnp.maximum(weight, low)


def openrlhf_columns(mask):
    """OpenRLHF does not skip holes: they are steps of value and reward 0, and are discounted. The columns it steps
    through."""
    return jnp.flip(jnp.cumsum(jnp.flip(mask, 1), axis=1), 1) > 0


def openrlhf_whitened(advantages, mask):
    """OpenRLHF whitens by the population variance, without ε, over the tokens. Another whitening before is undone."""
    n = mask.sum()
    centered = advantages - jnp.where(mask, advantages, 0.0).sum() / n
    return centered / jnp.sqrt(jnp.where(mask, centered**2, 0.0).sum() / n)


def swift_scaled(advantages, of, group, scale: str):
    """ms-swift divides RLOO's advantages by the deviation of the rewards and those of its REINFORCE++, which does not
    whiten, by their own: in the group or over the batch."""
    everybody = jnp.ones(of.shape, bool)
    if scale not in ("group", "batch"):
        return advantages
    std = groups.group_std(of, group, everybody) if scale == "group" else statistics.masked_std(of, everybody)
    return advantages / (std + 1e-4)


def swift_column_decay(gamma: float, mask):
    """ms-swift's FIPO decays by columns, holes included; ours by decisions. γ to the distance of the next token."""
    T = mask.shape[1]
    own = jnp.where(mask, jnp.arange(T)[None], T)
    following = jax.lax.cummin(own, axis=1, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=T)[:, 1:]
    return jnp.where(mask, gamma ** (following - jnp.arange(T)[None]).astype(float), 1.0)


# ------------------------------------------------------------------------------------- TRL's trainers (tests/replay)


def trl_prepared_alone(objective: Objective, count: int) -> Objective:
    """TRL knows no optimizer batch: what needs more than one row (a token mean, a quantile, a rank) it takes from each
    of its `count` micro-batches alone, and averages the losses. Rows stand micro-batch after micro-batch."""

    def prepare(params, frozen, batch, key, map_rows=all_at_once):
        rows = max(x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)) // count
        parts = []
        for m in range(count):
            part = jax.tree.map(lambda x, m=m: x[m * rows : (m + 1) * rows] if jnp.ndim(x) else x, batch)
            part = objective.prepare(params, frozen, part, key)
            parts.append(part.replace(weight=part.weight / count))
        return jax.tree.map(lambda *x: jnp.concatenate(x) if jnp.ndim(x[0]) else x[0], *parts)

    return objective._replace(prepare=prepare)


def trl_sum(*parts: tuple[float, Objective]) -> Objective:
    """TRL's list of DPO losses: Σ w_k L_k of objectives over the same batch. Metrics are the first one's."""

    def prepare(params, frozen, batch, key, map_rows=all_at_once):
        for _, objective in parts:
            batch = objective.prepare(params, frozen, batch, key)
        return batch

    def loss(params, frozen, batch):
        found = [objective.loss(params, frozen, batch) for _, objective in parts]
        return sum(weight * value for (weight, _), (value, _) in zip(parts, found, strict=True)), found[0][1]

    return Objective(prepare, loss)


def trl_token_count(algorithm: Algorithm) -> Algorithm:
    """TRL divides by a count of tokens that it was told, of a generation's batch (num_items_in_batch), not of what it
    learns from: `extra["share"]` is ours over its."""

    def prepare(output, batch, key):
        batch = batch if algorithm.prepare is None else algorithm.prepare(output, batch, key)
        return batch.replace(weight=batch.weight * batch.extra["share"])

    return algorithm._replace(prepare=prepare)


def trl_one_ratio_a_row(algorithm: Algorithm) -> Algorithm:
    """TRL's importance_sampling_level="sequence" puts GSPO's ratio into any loss, and into the weight of the KL term.
    The ratio is that to an old policy which is log π - (1/n) Σ_t log ρ_t."""

    def loss(output, batch):
        log_ratio = sequence_geometric_mean(output.logp - old_policy_logp(batch.traj), batch.mask, batch.traj.segments)
        traj = batch.traj.replace(old_logp=output.logp - log_ratio)
        return algorithm.loss(output, batch.replace(traj=traj))

    return algorithm._replace(loss=loss)


def trl_entropy_bonus(algorithm: Algorithm, coefficient: float) -> Algorithm:
    """TRL's entropy bonus is a mean over the tokens that keep their gradient, however the loss itself is averaged; in
    ours every term of a decision has the same weight."""
    inner = with_entropy(algorithm, coefficient)

    def find(output, batch):
        own = token_mean(batch.mask & batch.extra.get("high_entropy_kept", batch.mask))
        return {"bonus": jnp.where(batch.weight > 0, own / jnp.where(batch.weight > 0, batch.weight, 1.0), 0.0)}

    def loss(output, batch):
        terms, metrics = inner.loss(output.replace(entropy=batch.extra["bonus"] * output.entropy), batch)
        return terms, {**metrics, "entropy": output.entropy}

    return with_prepare(inner._replace(loss=loss), find)


def transformers_padding_row(policy: Callable, tied: bool, pad: int) -> Callable:
    """transformers' embedding has no gradient at the padding token, even where that token is drawn and read like any
    other (torch's padding_idx); a tied head has one all the same. Ours knows no padding token. `policy` is one of the
    untied model; what is returned takes the parameters as they are."""

    def dialect(params, frozen, traj):
        decoder = params["decoder"]
        table = decoder["embedding"]
        read = table.at[pad].set(jax.lax.stop_gradient(table[pad]))
        head = table.T if tied else decoder["head"]
        return policy({**params, "decoder": {**decoder, "embedding": read, "head": head}}, frozen, traj)

    return dialect
