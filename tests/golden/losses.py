"""Policy losses against the peers: value, gradient and metrics through the objective, as `update` computes them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax import algorithms as a
from rljax.algorithms.common.corrections import sampler_ratio
from rljax.ops import kl, losses, ratios, sequences, shaping, statistics, weights
from rljax.train import diagnostics
from rljax.train.objective import policy_objective
from rljax.types import Algorithm, Batch, PolicyOutput
from tests import dialects
from tests.golden.entry import Case, Entry, trajectory
from tests.golden.estimation import mask_of, verl_weights

NEVER = float("inf")


class Learned(NamedTuple):
    loss: jax.Array
    gradient: dict  # by each field of the policy's output
    metrics: dict  # as logged: means over decisions
    shown: dict  # the metrics of the algorithm, [B T]


def learn(algorithm: Algorithm, batch: Batch, **outputs) -> Learned:
    """One update of a policy whose parameters are its outputs, short of the step."""
    objective = policy_objective(lambda params, frozen, traj: PolicyOutput(**params), algorithm)
    batch = objective.prepare(outputs, {}, batch, jax.random.key(0))
    (loss, sums), gradient = jax.value_and_grad(objective.loss, has_aux=True)(outputs, {}, batch)
    metrics = {name: total / count for name, (total, count) in sums.items()}
    return Learned(loss, gradient, metrics, algorithm.loss(PolicyOutput(**outputs), batch)[1])


def batch_of(mask, old_logp, advantages, sampler_logp=None, **facts) -> Batch:
    """A batch with these advantages, [B] or [B T]; `old_logp` is the sampler's too unless that is given."""
    traj = trajectory(mask, logp=old_logp if sampler_logp is None else sampler_logp, old_logp=old_logp, **facts)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return Batch(traj=traj, advantages=jnp.broadcast_to(advantages, mask.shape), mask=mask)


def number(case: Case, name: str, otherwise: float | None = None) -> float:
    return float(case.hyper[name] if otherwise is None else case.hyper.get(name, otherwise))


def clip_range(case: Case, prefix: str) -> tuple[float, float]:
    return number(case, prefix + "low"), number(case, prefix + "high")


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_reduction(case: Case, otherwise: str = "token-mean"):
    mode = case.hyper.get("loss_agg_mode", otherwise)

    def reduction(mask, segments=None, group=None):
        weight = verl_weights(mode, mask, float(case.width))
        return dialects.verl_january_sum_norm(weight, mask) if mode == "seq-mean-token-sum-norm" else weight

    return reduction


def verl_batch(case: Case, **facts) -> Batch:
    x, mask = case.ins, mask_of(case)
    weight = x.get("rollout_is_weights")
    sampler = None if weight is None else dialects.sampler_of(x["old_log_prob"], weight, mask)
    return batch_of(mask, x["old_log_prob"], x["advantages"], sampler, **facts)


def verl_kl(case: Case, bound: float | None = 20.0):
    """verl clamps the log ratio in most losses."""
    x, mask = case.ins, mask_of(case)
    change = kl.k1(x["old_log_prob"], x["log_prob"])
    change = change if bound is None else dialects.bounded_value(change, bound)
    return dialects.verl_mean(statistics.masked_mean(change, mask), mask)


def verl_share(case: Case, chosen):
    mask = mask_of(case)
    return dialects.verl_mean(statistics.masked_mean(jnp.asarray(chosen, float), mask), mask)


def verl_out(case: Case, learned: Learned, bound: float | None = 20.0, clipped: str = "clip_fraction") -> dict:
    out = {"loss": learned.loss, "grad_log_prob": learned.gradient["logp"], "metric actor/ppo_kl": verl_kl(case, bound)}
    if clipped in learned.metrics:
        out["metric actor/pg_clipfrac"] = dialects.verl_mean(learned.metrics[clipped], mask_of(case))
    return out


def verl_loss(case: Case, algorithm: Algorithm, reduction=None, **kwargs) -> dict:
    algorithm = algorithm._replace(weights=verl_reduction(case) if reduction is None else reduction)
    return verl_out(case, learn(algorithm, verl_batch(case), logp=case.ins["log_prob"]), **kwargs)


def verl_ppo_clip(case: Case) -> dict:
    """PPO without its critic: value and return are 0."""
    nothing = jnp.zeros_like(case.ins["log_prob"])
    batch = verl_batch(case, values=jnp.pad(nothing, ((0, 0), (0, 1)))).replace(returns=nothing)

    def learned(dual):
        algorithm = a.ppo(*clip_range(case, "clip_ratio_"), value_clip=None, dual=dual)
        if "rollout_is_weights" in case.ins:
            algorithm = a.truncate_is(algorithm, NEVER)
        algorithm = algorithm._replace(weights=verl_reduction(case))
        return learn(algorithm, batch, logp=case.ins["log_prob"], values=nothing)

    with_dual, without = learned(number(case, "clip_ratio_c")), learned(None)
    lowered = with_dual.shown["policy_loss"] < without.shown["policy_loss"]
    out = verl_out(case, with_dual) | {"metric actor/pg_clipfrac_lower": verl_share(case, lowered)}
    # verl counts the dual clip only there
    return out | {"metric actor/pg_clipfrac": dialects.verl_mean(without.metrics["clip_fraction"], mask_of(case))}


def verl_cispo(case: Case) -> dict:
    """verl takes distances from 1, ours are ratios."""
    low, high = clip_range(case, "clip_ratio_")
    return verl_loss(case, a.cispo(1.0 - low, 1.0 + high), clipped="weight_clip_fraction")


def verl_clip_cov(case: Case) -> dict:
    """Recorded with the first candidates in place of random ones."""
    order = jnp.arange(len(case.ins["log_prob"])) if case.order is None else jnp.asarray(case.order)

    def first(key, shape):
        return -(order[:, None] * 1e6 + jnp.arange(shape[1])[None])

    bounds = number(case, "clip_cov_lb"), number(case, "clip_cov_ub")
    share = number(case, "clip_cov_ratio")
    algorithm = a.clip_cov(*clip_range(case, "clip_ratio_"), share=share, bounds=bounds, draw=first)
    return verl_loss(case, algorithm, bound=None, clipped="dropped")


def verl_kl_cov(case: Case) -> dict:
    x = case.ins
    out = verl_loss(case, a.kl_cov(number(case, "kl_cov_ratio"), number(case, "ppo_kl_coef")))
    return out | {"metric actor/ppo_kl": verl_share(case, kl.absolute(x["log_prob"], x["old_log_prob"]))}


def verl_geo_mean(case: Case) -> dict:
    algorithm = a.gmpo(*clip_range(case, "clip_ratio_"))

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        mean = sequences.sequence_mean(batch.advantages, batch.mask)
        return dialects.verl_geometric_mean(terms, mean, batch.mask), metrics

    reduction = dialects.divided_by_all_rows(weights.seq_mean_token_mean)
    return verl_loss(case, algorithm._replace(loss=loss), reduction, bound=None)


def verl_gspo(case: Case) -> dict:
    algorithm = a.gspo_token(*clip_range(case, "clip_ratio_"))
    return verl_loss(case, algorithm, verl_reduction(case, "seq-mean-token-mean"), bound=None)


def verl_sapo(case: Case) -> dict:
    algorithm = a.sapo(number(case, "tau_pos"), number(case, "tau_neg"))
    return verl_loss(case, algorithm, verl_reduction(case, "seq-mean-token-mean"))


def verl_gpg(case: Case) -> dict:
    return verl_loss(case, a.gpg())


def verl_reinforce_is(case: Case) -> dict:
    return verl_loss(case, a.truncate_is(a.reinforce(), NEVER), verl_reduction(case, "seq-mean-token-sum"))


def verl_dppo(case: Case) -> dict:
    make = a.dppo_tv if "tv" in case.name else a.dppo_kl
    cap = number(case, "clip_ratio_c")
    batch, logp = verl_batch(case), case.ins["log_prob"]
    learned = learn(
        make(*clip_range(case, "clip_ratio_"), cap)._replace(weights=verl_reduction(case)), batch, logp=logp
    )
    capped = (ratios.importance_ratio(logp, batch.traj.old_logp) > cap) & (learned.shown["clip_fraction"] == 0)
    return verl_out(case, learned) | {"metric actor/pg_clipfrac_lower": verl_share(case, capped)}


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl_reduction(case: Case, prefix: str = ""):
    """grpo, dr_grpo, sapo and luspo divide by all rows, the others by tokens."""
    over_rows = {
        "grpo": weights.seq_mean_token_mean,
        "sapo": weights.seq_mean_token_mean,
        "luspo": weights.seq_mean_token_sum,
        "dr_grpo": weights.seq_mean_token_sum_norm(number(case, "max_completion_length")),
    }
    kind = case.hyper.get("loss_type", "grpo")
    return dialects.divided_by_all_rows(over_rows[kind]) if kind in over_rows else weights.token_mean


def trl_policy(case: Case) -> Algorithm:
    """Its clip range for CISPO is a ratio, and has no lower end."""
    kind, (low, high) = case.hyper.get("loss_type", "grpo"), clip_range(case, "epsilon_")
    if kind == "cispo":
        return a.cispo(0.0, high)
    if kind == "sapo":
        return a.sapo(number(case, "args.sapo_temperature_pos", 1.0), number(case, "args.sapo_temperature_neg", 1.05))
    if kind == "vespo":
        return a.vespo()
    if case.hyper.get("importance_sampling_level") == "sequence":
        return a.luspo(low, high) if kind == "luspo" else a.gspo(low, high)
    return a.grpo(low, high)


def two_sided(algorithm: Algorithm, bound: float) -> Algorithm:
    """TRL's delta: the ratio is cut at `bound` first; the same as the dual clip."""

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        return losses.dual_clip(terms, batch.advantages, bound), metrics

    return algorithm._replace(loss=loss)


def trl_two_sided(case: Case) -> Algorithm:
    """A delta within the clip range cuts the ratios of good answers too, and TRL does not count those."""
    high, bound = number(case, "epsilon_high"), number(case, "args.delta")
    narrower = case._replace(hyper={**case.hyper, "epsilon_high": min(high, bound - 1.0)})
    algorithm = two_sided(trl_policy(narrower), max(bound, 1.0 + high))

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        counted = (bound > 1.0 + high) | (batch.advantages < 0)
        return terms, {**metrics, "clip_fraction": metrics["clip_fraction"] * counted}

    return algorithm._replace(loss=loss)


def trl_algorithm(case: Case) -> Algorithm:
    x, hyper = case.ins, case.hyper
    algorithm = trl_two_sided(case) if "args.delta" in hyper else trl_policy(case)
    algorithm = algorithm._replace(weights=trl_reduction(case))
    if "off_policy_mask_threshold" in hyper:
        algorithm = a.off_policy_sequence_mask(algorithm, number(case, "off_policy_mask_threshold"))
    if "top_entropy_quantile" in hyper:
        share, mask = number(case, "top_entropy_quantile"), mask_of(case, "completion_mask")
        algorithm = a.high_entropy_mask(algorithm, dialects.trl_float32_share(share, x["entropies"], mask))
    if "importance_sampling_ratio" in x:
        algorithm = a.truncate_is(algorithm, NEVER)
    if "beta" in hyper:
        unbiased = hyper.get("args.use_bias_correction_kl", False)
        algorithm = (a.with_importance_weighted_kl if unbiased else a.with_kl)(algorithm, number(case, "beta"))
    return algorithm


def trl_batch(case: Case) -> Batch:
    x, mask = case.ins, mask_of(case, "completion_mask")
    old, sampler = x["old_per_token_logps"], x.get("sampling_per_token_logps")
    if "importance_sampling_ratio" in x:
        weight = jnp.broadcast_to(x["importance_sampling_ratio"], mask.shape)
        sampler = dialects.sampler_of(old, weight, mask)
    return batch_of(mask, old, x["advantages"], sampler, ref_logp=x.get("ref_per_token_logps"))


def trl_out(case: Case, batch: Batch, learned: Learned) -> dict:
    out = {"loss": learned.loss, "grad_per_token_logps": learned.gradient["logp"]}
    out |= {f"metric {name}": learned.metrics[name] for name in ("entropy", "kl") if name in learned.metrics}
    clipped = learned.shown.get("clip_fraction", learned.shown.get("weight_clip_fraction"))
    if clipped is not None:
        one_a_row = case.hyper.get("importance_sampling_level") == "sequence"
        out |= trl_clip_metrics(clipped, batch, one_a_row)
    if "phi" in learned.shown:
        phi = sequences.sequence_mean(learned.shown["phi"], batch.mask)[:, 0]
        out["metric vespo/phi_seq_mean"] = dialects.trl_row_mean(phi, batch.mask, 1.0)
    return out


def trl_clip_metrics(clipped, batch: Batch, one_a_row: bool) -> dict:
    """By the sign of the advantage; `one_a_row`: as a share of rows, not of tokens."""
    mask, good = batch.mask, batch.advantages > 0
    rows = mask.any(axis=1)
    found = {"low": clipped * ~good, "high": clipped * good, "region": clipped}
    by_row = {name: sequences.sequence_mean(x, mask)[:, 0] for name, x in found.items()}
    mean = {name: statistics.masked_mean(x, mask) for name, x in found.items()}
    if one_a_row:
        mean, rows = {name: dialects.trl_row_mean(x, mask, 0.0) for name, x in by_row.items()}, jnp.ones_like(rows)
    return {
        **{f"metric clip_ratio/{name}_mean": x for name, x in mean.items()},
        "metric clip_ratio/low_min": statistics.masked_min(by_row["low"], rows),
        "metric clip_ratio/high_max": statistics.masked_max(by_row["high"], rows),
        "metric cispo_clip_ratio": mean["high"],
    }


def trl_family(case: Case) -> dict:
    """The entropy bonus is a mean over tokens whatever the loss is: it is taken alone, as a difference."""
    x, batch, algorithm = case.ins, trl_batch(case), trl_algorithm(case)
    outputs = {"logp": x["per_token_logps"], "entropy": x.get("entropies", jnp.zeros_like(x["per_token_logps"]))}
    learned = learn(algorithm, batch, **outputs)
    out = trl_out(case, batch, learned)
    if case.hyper.get("_entropy_bonus_enabled"):
        by_tokens = algorithm._replace(weights=weights.token_mean)
        plain = learn(by_tokens, batch, **outputs)
        bonus = learn(a.with_entropy(by_tokens, number(case, "entropy_coef")), batch, **outputs)
        out |= {"loss": learned.loss + bonus.loss - plain.loss, "metric policy_loss": learned.loss}
        out["grad_entropies"] = bonus.gradient["entropy"]
    return out


def trl_variant(case: Case, algorithm: Algorithm) -> dict:
    x, batch = case.ins, trl_batch(case)
    outputs = {"logp": x["per_token_logps"], "entropy": jnp.zeros_like(x["per_token_logps"])}
    learned = learn(algorithm._replace(weights=trl_reduction(case)), batch, **outputs)
    return trl_out(case, batch, learned)


def trl_gspo_token(case: Case) -> dict:
    return trl_variant(case, a.gspo_token(*clip_range(case, "epsilon_")))


def trl_gmpo(case: Case) -> dict:
    x, mask = case.ins, mask_of(case, "completion_mask")
    out = trl_variant(case, a.gmpo(*clip_range(case, "epsilon_")))
    gain = x["advantages"]
    of_empty = dialects.trl_empty_rows(jnp.zeros_like(gain), gain, mask, lambda ratio, gain: -ratio * gain)
    return out | {"loss": out["loss"] + of_empty}


def trl_rloo(case: Case) -> dict:
    x, mask = case.ins, mask_of(case, "completion_mask")
    old = shaping.at_last_decision(x["old_logps"], mask)
    clip = clip_range(case, "epsilon_")
    algorithm = a.rloo(*clip)._replace(weights=dialects.divided_by_all_rows(weights.seq_mean_token_mean))
    learned = learn(algorithm, batch_of(mask, old, x["advantages"]), logp=x["per_token_logps"])
    of_empty = dialects.trl_empty_rows(
        x["old_logps"], x["advantages"], mask, lambda ratio, gain: losses.clipped_surrogate(ratio, gain, *clip)
    )
    return {"loss": learned.loss + of_empty, "grad_per_token_logps": learned.gradient["logp"]}


def trl_ppo(case: Case) -> dict:
    """Policy and critic have masks of their own: two updates, each with the other part switched off."""
    x = case.ins
    coefficient = number(case, "vf_coef")
    clip, value_clip = number(case, "cliprange"), number(case, "cliprange_value")
    facts = {"values": jnp.pad(x["values"], ((0, 0), (0, 1)))}
    outputs = {"logp": x["new_logprobs"], "values": x["vpred"]}

    def learned(padding, advantages, scale):
        batch = batch_of(~(x[padding] > 0), x["old_logprobs"], advantages, **facts).replace(returns=x["returns"])
        return learn(a.ppo(clip, clip, value_coefficient=scale, value_clip=value_clip), batch, **outputs)

    policy = learned("padding_mask", x["advantages"], 0.0)
    critic = learned("padding_mask_p1", jnp.zeros_like(x["advantages"]), coefficient)
    return {
        "loss": policy.loss + critic.loss,
        "pg_loss": policy.metrics["policy_loss"],
        "vf_loss": critic.metrics["value_loss"],
        "grad_new_logprobs": policy.gradient["logp"],
        "grad_vpred": critic.gradient["values"],
    }


# ------------------------------------------------------------------------------------------------------------ ms-swift


def swift_policy(case: Case, mask) -> Algorithm:
    hyper, kind, clip = case.hyper, case.hyper["loss_type"], clip_range(case, "epsilon_")
    level = {"sequence": a.gspo, "sequence_token": a.gspo_token}.get(hyper.get("importance_sampling_level"))
    if level is not None:
        return level(*clip)
    if kind == "cispo":
        return a.cispo(0.0, clip[1])
    if kind == "sapo":
        return a.sapo(number(case, "tau_pos"), number(case, "tau_neg"))
    if kind == "real":
        return a.real(number(case, "real_tau"))
    if kind == "fipo":
        decay = dialects.swift_column_decay(number(case, "fipo_gamma"), mask)
        return a.fipo(*clip, decay, number(case, "fipo_clip_range"), number(case, "fipo_safety_threshold"))
    return a.grpo(*clip)


def swift_family(case: Case) -> dict:
    x, hyper, mask = case.ins, case.hyper, mask_of(case, "completion_mask")
    cut = shaping.last_decision(mask) & (x["truncated_mask"] > 0)[:, None]
    facts = {"ref_logp": x["ref_per_token_logps"], "group": x["index"], "truncated": cut}
    given = batch_of(mask, x["old_per_token_logps"], x["advantages"], **facts)

    algorithm = swift_policy(case, mask)
    if hyper["loss_type"] in ("dapo", "cispo", "fipo"):
        algorithm = algorithm._replace(weights=dialects.divided_by_tokens_before(mask))
    elif hyper["loss_type"] != "real":
        algorithm = algorithm._replace(weights=trl_reduction(case))
    if hyper.get("beta"):
        estimator = lambda logp, ref_logp: dialects.bounded_value(kl.k3(logp, ref_logp), 10.0)  # noqa: E731
        algorithm = a.with_kl(algorithm, number(case, "beta"), estimator)
    if "off_policy_sequence_mask_delta" in hyper:
        algorithm = a.off_policy_sequence_mask(algorithm, number(case, "off_policy_sequence_mask_delta"))
    algorithm = algorithm._replace(credit=lambda traj, coefficients: given)
    if hyper.get("overlong_filter"):
        algorithm = a.filter_overlong(algorithm)

    learned = learn(algorithm, algorithm.credit(given.traj, {}), logp=x["per_token_logps"])
    return {"loss": learned.loss, "grad_per_token_logps": learned.gradient["logp"]}


# ------------------------------------------------------------------------------------------------------------ OpenRLHF


def openrlhf_correction(case: Case, algorithm: Algorithm) -> Algorithm:
    low, high = map(float, case.hyper["vllm_is_truncated_threshold"])
    kind = case.hyper["vllm_is_correction_type"]
    if kind == "icepop":
        return a.mask_is(algorithm, low, high)

    def weight(batch):
        if kind == "tis":
            return dialects.at_least(ratios.truncate_weights(sampler_ratio(batch), high), low)
        of_answer = ratios.mask_weights(sampler_ratio(batch, ratios.sequence_geometric_mean), low, high)
        return jnp.where(of_answer > 0, sampler_ratio(batch), 0.0)  # a filter: the token's own weight is not bounded

    def loss(output, batch):
        terms, metrics = algorithm.loss(output, batch)
        return weight(batch) * terms, metrics

    return algorithm._replace(loss=loss)


def openrlhf_policy(case: Case) -> dict:
    x, hyper, mask = case.ins, case.hyper, mask_of(case, "action_mask")
    clip = clip_range(case, "clip_eps_")
    algorithm = a.gspo(*clip) if hyper.get("policy_loss_type") == "gspo" else a.grpo(*clip)
    of_rows = dialects.openrlhf_sequence_mean(weights.seq_mean_token_mean)
    by_rows = hyper.get("policy_loss_type") == "gspo" or not hyper.get("token_level_loss", True)
    algorithm = algorithm._replace(weights=of_rows if by_rows else weights.token_mean)
    if hyper.get("dual_clip") is not None:
        algorithm = two_sided(algorithm, number(case, "dual_clip"))
    if hyper.get("enable_vllm_is_correction"):
        algorithm = openrlhf_correction(case, algorithm)

    old, sampler = x["old_log_probs"], x.get("rollout_log_probs")
    learned = learn(algorithm, batch_of(mask, old, x["advantages"], sampler), logp=x["log_probs"])
    out = {
        "loss": learned.loss,
        "grad_log_probs": learned.gradient["logp"],
        "clip_ratio": learned.metrics["clip_fraction"],
        "ppo_kl": statistics.masked_mean(kl.k1(old, x["log_probs"]), mask),
    }
    return out if sampler is None else out | {"vllm_kl": diagnostics.sampler_mismatch(old, sampler, mask)["kl"]}


# -------------------------------------------------------------------------------- sampler corrections, by their weights


def sampler_weight(algorithm: Algorithm, mask, log_ratio):
    """[B T] what the correction multiplies the terms with."""
    nothing = jnp.zeros_like(log_ratio)
    batch = batch_of(mask, jnp.where(mask, log_ratio, 0.0), nothing, nothing)
    return learn(algorithm, batch, logp=nothing).shown["sampler_weight"]


def verl_rollout_is(case: Case) -> dict:
    mask, hyper = mask_of(case), case.hyper
    by_token = hyper["rollout_is"] == "token"
    level = ratios.token_level if by_token else ratios.sequence_product
    cap = number(case, "rollout_is_threshold")

    def weight(algorithm):
        return sampler_weight(algorithm, mask, case.ins["log_ratio"])

    def mean(mask, segments=None, group=None):
        if by_token:
            return dialects.verl_mean(weights.token_mean(mask), mask)
        return dialects.verl_row_mean(weights.seq_mean_token_mean(mask), mask)

    raw, capped = weight(a.truncate_is(a.reinforce(), NEVER, level)), weight(a.truncate_is(a.reinforce(), cap, level))
    out = {"weights": capped, "metric rollout_is_mean": verl_share(case, raw)}
    if hyper["rollout_is_batch_normalize"]:
        normalized = weight(a.normalized_is(a.reinforce(), mean, cap, level))
        out["weights"] = normalized / mean(mask).sum()  # verl's mean does not quite sum to one
        out["metric rollout_is_batch_norm_factor"] = capped.sum() / out["weights"].sum()
    rows, largest, least = mask.any(axis=1), statistics.masked_max(raw, mask), statistics.masked_min(raw, mask)
    if not by_token:
        largest = dialects.verl_rows_without_decisions(largest, rows, 1.0, "max")
        least = dialects.verl_rows_without_decisions(least, rows, 1.0, "min")
    return out | {"metric rollout_is_max": largest, "metric rollout_is_min": least}


def swift_rollout_is(case: Case) -> dict:
    mask, cap = mask_of(case, "completion_mask"), number(case, "threshold")
    level, _, kind = case.hyper["mode"].partition("_")
    level = {"token": ratios.token_level, "sequence": ratios.sequence_geometric_mean}[level]

    def weight(algorithm):
        return sampler_weight(algorithm, mask, case.ins["rollout_log_ratio"])

    if kind == "truncate":
        return {"weights": weight(a.truncate_is(a.reinforce(), cap, level))}
    kept = weight(a.mask_is(a.reinforce(), 0.0, cap, level)) > 0
    return {
        "weights": jnp.where(kept, weight(a.truncate_is(a.reinforce(), NEVER)), 0.0)
    }  # a filter on the token's own weight


def trl_rollout_is(case: Case) -> dict:
    """Its sequence modes give one number a row."""
    x, mask = case.ins, mask_of(case, "completion_mask")
    name, _, kind = case.hyper["mode"].partition("_")
    level = {"token": ratios.token_level, "sequence": ratios.sequence_product}[name]
    low, high = case.hyper["clip_min"], case.hyper["clip_max"]
    low, high = 0.0 if low is None else float(low), NEVER if high is None else float(high)
    algorithm = (
        a.mask_is(a.reinforce(), low, high, level) if kind == "mask" else a.truncate_is(a.reinforce(), high, level)
    )
    weight = sampler_weight(algorithm, mask, x["old_per_token_logps"] - x["sampling_per_token_logps"])
    weight = dialects.at_least(weight, low) if kind == "truncate" else weight
    if name == "sequence":
        weight = sequences.sequence_mean(weight, mask)[:, :1]
    return {"importance_sampling_ratio": weight}


def verl_rejection(case: Case) -> dict:
    """Every option is measured on the whole mask; a decision stays if all of them keep it."""
    mask, kept = mask_of(case), mask_of(case)
    options = case.hyper["rollout_rs"].split(",")
    specs = str(case.hyper["threshold"]).split(",")
    nothing = jnp.zeros(mask.shape)
    batch = batch_of(mask, case.ins["log_ratio"], nothing, nothing)
    given = a.sft()._replace(credit=lambda traj, coefficients: batch)
    for option, spec in zip(options, specs * len(options) if len(specs) == 1 else specs, strict=True):
        level, _, estimator = option.rpartition("_")
        low, high = verl_bounds(estimator, spec)
        algorithm = a.reject(given, low, high, getattr(kl, estimator), REJECTION_LEVELS[level])
        kept = kept & algorithm.credit(batch.traj, {}).mask
    return {"mask": kept, "masked_fraction": verl_share(case, ~kept)}


REJECTION_LEVELS = {
    "token": ratios.token_level,
    "seq_sum": sequences.sequence_sum,
    "seq_mean": sequences.sequence_mean,
    "seq_max": sequences.sequence_max,
}


def verl_bounds(estimator: str, spec: str) -> tuple[float, float]:
    """verl bounds the ratio for k1 (on both sides, by 1/upper if only that is given), the estimate for the others."""
    if estimator != "k1":
        return -NEVER, float(spec)
    low, _, high = spec.rpartition("_")
    return math.log(float(low) if low else 1.0 / float(high)), math.log(float(high))


ALWAYS_0 = {"metric actor/pg_clipfrac_lower": "always 0"}


def verl(pins: str, run, **changes) -> Entry:
    return Entry(pins, run, mask="response_mask", **changes)


def trl(pins: str, run, **changes) -> Entry:
    return Entry(pins, run, mask="completion_mask", **changes)


TABLE: dict[str, Entry] = {
    "verl_ppo_clip_loss": verl("ppo, truncate_is", verl_ppo_clip),
    "verl_cispo_loss": verl("cispo", verl_cispo, not_compared=ALWAYS_0),
    "verl_clip_cov_loss": verl("clip_cov", verl_clip_cov),
    "verl_kl_cov_loss": verl("kl_cov", verl_kl_cov),
    "verl_geo_mean_loss": verl(
        "gmpo",
        verl_geo_mean,
        not_compared={
            "metric actor/pg_clipfrac*": "counts ratios outside on the harmless side, where nothing is clipped"
        },
    ),
    "verl_gspo_loss": verl("gspo_token", verl_gspo, not_compared=ALWAYS_0),
    "verl_sapo_loss": verl("sapo", verl_sapo, not_compared={"metric actor/pg_clipfrac*": "always 0"}),
    "verl_gpg_loss": verl("gpg", verl_gpg),
    "verl_reinforce_is_loss": verl("reinforce, truncate_is", verl_reinforce_is),
    "verl_new_dppo_loss": verl("dppo_tv, dppo_kl", verl_dppo),
    "trl_grpo_family_loss": trl(
        "grpo, cispo, sapo, gspo, luspo, vespo, with_kl, with_importance_weighted_kl, with_entropy, truncate_is, "
        "off_policy_sequence_mask, high_entropy_mask",
        trl_family,
        not_compared={"metric entropy_coef": "a hyperparameter"},
    ),
    "trl_gmpo_loss": trl("gmpo", trl_gmpo),
    "trl_gspo_token_loss": trl("gspo_token", trl_gspo_token),
    "trl_rloo_loss": trl("rloo", trl_rloo),
    "trl_ppo_loss": Entry("ppo", trl_ppo, mask="padding_mask"),
    "swift_grpo_family_loss": trl(
        "grpo, cispo, sapo, gspo, gspo_token, fipo, real, with_kl, off_policy_sequence_mask, filter_overlong",
        swift_family,
    ),
    "openrlhf_policy_loss": Entry("grpo, gspo, mask_is", openrlhf_policy, mask="action_mask"),
    "verl_rollout_is_weights": verl(
        "truncate_is, normalized_is",
        verl_rollout_is,
        not_compared={
            "metric rollout_is_seq_*": "of means of weights over rows, which nobody logs here",
            "metric rollout_is_ratio_fraction_*": "shares beyond the cap and its inverse, which nobody logs here",
            "metric rollout_is_std": "of weights clamped from below too",
            "metric rollout_is_eff_sample_size": "of weights clamped from below too",
        },
    ),
    "verl_rollout_rejection_mask": verl("reject", verl_rejection),
    "swift_rollout_is_weights": trl("truncate_is, mask_is", swift_rollout_is, at_mask=True),
    "trl_rollout_is_ratio": trl("truncate_is, mask_is", trl_rollout_is, at_mask=True),
}
