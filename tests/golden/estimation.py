"""Estimators, returns, shaping, reductions, controllers and diagnostics against the peers."""

import re

import jax.numpy as jnp

from rljax.algorithms.common.controllers import adaptive_kl
from rljax.ops import kl, logprobs, losses, q_learning, returns, sequences, shaping, statistics, weights
from rljax.train import diagnostics, metrics
from rljax.types import Batch, Trajectory
from tests import dialects
from tests.golden.entry import Case, Entry, gradient

# ------------------------------------------------------------------------------------------------------------------ KL


def estimates(estimator, case: Case, ours: str, theirs: str, grad: str) -> dict:
    """Values and the gradient of their sum."""
    total = gradient(lambda x: estimator(x[ours], x[theirs]).sum(), case.ins, ours)
    return {"kl": estimator(case.ins[ours], case.ins[theirs]), grad: total[1]}


def openrlhf_approx_kl(case: Case) -> dict:
    estimator = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[case.hyper["kl_estimator"]]

    def clamped(logp, ref_logp):
        return dialects.bounded_value(estimator(logp, ref_logp), 10.0)

    return estimates(clamped, case, "log_probs", "log_probs_base", "grad_sum")


def tunix_kl(case: Case) -> dict:
    pair = case.ins["per_token_logps"], case.ins["ref_per_token_logps"]
    return {
        "kl": kl.k1(*pair),
        "mse_kl": kl.k2(*pair),
        "low_var_kl": dialects.unbounded_exponent(kl.k3(*pair), *pair),
    }


def verl_kl_penalty(case: Case) -> dict:
    """verl clamps its k3 to ±10."""
    estimator = {
        "k1": kl.k1,
        "k1+": kl.k1_with_k2_gradient,
        "abs": kl.absolute,
        "k2": kl.k2,
        "k3": lambda *x: dialects.bounded_value(kl.k3(*x), 10.0),
        "k3+": lambda *x: dialects.bounded_value_only(kl.k3_with_k2_gradient(*x), 10.0),
    }
    estimator["k3plus_intended"] = estimator["low_var_kl+"] = estimator["k3+"]
    return estimates(estimator[case.name], case, "logprob", "ref_logprob", "grad_sum_logprob")


# ---------------------------------------------------------------------------------------------------------- reductions


def mask_of(case: Case, name: str = "response_mask"):
    return case.ins[name] > 0


def verl_weights(mode: str, mask, width: float):
    """Our weights under verl's name of the mode, with its 1e-8."""
    if mode == "token-mean":
        return weights.token_mean(mask)
    if mode == "token-sum":
        return weights.token_sum(mask)
    if mode == "seq-mean-token-mean":
        return dialects.verl_row_mean(weights.seq_mean_token_mean(mask), mask)
    if mode == "seq-mean-token-sum":
        return weights.seq_mean_token_sum(mask)
    return weights.seq_mean_token_sum_norm(float(width))(mask)


def verl_agg_loss(case: Case, january: bool) -> dict:
    """Names of outs are "grad MODE", "MODE", "MODE global" (one of several ranks), "MODE scale=C" (C instead of T)."""
    mask, terms = mask_of(case, "loss_mask"), case.ins["loss_mat"]
    ranks, tokens, rows = (int(re.search(rf"{name}=(\d+)", case.hyper["global"])[1]) for name in GLOBAL)
    out = {}
    for name in case.outs:
        mode, _, option = name.removeprefix("grad ").partition(" ")
        scale = re.fullmatch(r"scale=(\d+)", option)
        weight = verl_weights(mode, mask, float(scale[1]) if scale else float(case.width))
        if january and mode == "seq-mean-token-sum-norm":
            weight = dialects.verl_january_sum_norm(weight, mask)
        if option == "global":
            own, whole = (mask.sum(), tokens) if mode == "token-mean" else (mask.any(axis=1).sum(), rows)
            weight = dialects.verl_share(weight, own, whole, ranks)
        out[name] = weight if name.startswith("grad ") else jnp.where(mask, weight * terms, 0.0).sum()
    return out


GLOBAL = ("dp_size", "batch_num_tokens", "global_batch_size")


def tunix_aggregate_loss(case: Case) -> dict:
    mask, terms = mask_of(case, "completion_mask"), case.ins["per_token_loss"]
    by_mode = {
        "token-mean": weights.token_mean(mask),
        "sequence-mean-token-mean": weights.seq_mean_token_mean(mask),
        "sequence-mean-token-scale": weights.seq_mean_token_sum_norm(float(case.width))(mask),
        "seq-mean-token-sum": weights.seq_mean_token_sum(mask),
        "sequence-mean-token-sum-norm": weights.over_all_rows(weights.seq_mean_token_sum)(mask),
    }
    return {mode: (weight * terms).sum() for mode, weight in by_mode.items()}


def verl_entropy(case: Case) -> dict:
    mask = mask_of(case)
    weight = verl_weights(case.hyper["loss_agg_mode"], mask, case.width)

    def mean(ins):
        each = logprobs.entropy(ins["logits"], jnp.ones_like(weight))
        return jnp.where(mask, weight * each, 0.0).sum()

    return dict(zip(("entropy", "grad_logits"), gradient(mean, case.ins, "logits"), strict=True))


# ------------------------------------------------------------------------------------------------------- returns (rlax)


def all_of(x):
    return jnp.ones(x.shape, bool)


def values_of(case: Case):
    """rlax's values of the next steps as ours of all steps; the first one plays no part in a return."""
    return jnp.concatenate([case.ins["v_t"][:1], case.ins["v_t"]])


def rlax_discounted_returns(case: Case) -> dict:
    rewards, end = case.ins["r_t"], case.ins["v_t"][-1]
    return {"returns": returns.discounted_returns(rewards, all_of(rewards), case.ins["discount_t"], end)}


def rlax_gae(case: Case) -> dict:
    rewards, values, gamma = (case.ins[name] for name in ("r_t", "values", "discount_t"))
    return {"advantages": returns.gae(rewards, values, all_of(rewards), gamma, case.hyper["lambda_"])}


def rlax_importance_corrected_td(case: Case) -> dict:
    rewards, values, ratios, gamma = (case.ins[name] for name in ("r_t", "values", "rho_tm1", "discount_t"))
    lam = case.hyper["lambda_"]
    return {"errors": returns.importance_corrected_td_errors(rewards, values, ratios, all_of(rewards), gamma, lam)}


def rlax_lambda_returns(case: Case) -> dict:
    rewards, gamma = case.ins["r_t"], case.ins["discount_t"]
    lams = {"zero": 0.0, "one": 1.0, "scalar": case.hyper["lambda_"], "vector": case.ins["lambda_vec"]}
    each = {name: (rewards, values_of(case), all_of(rewards), gamma, lam) for name, lam in lams.items()}
    return {name: returns.lambda_returns(*args) for name, args in each.items()}


def rlax_n_step_returns(case: Case) -> dict:
    """Names of outs are "nK"."""
    rewards, gamma = case.ins["r_t"], case.ins["discount_t"]
    return {
        name: returns.n_step_returns(rewards, values_of(case), all_of(rewards), int(name[1:]), gamma)
        for name in case.outs
    }


def rlax_vtrace_facts(case: Case, mask):
    """Rewards that make rlax's V of the next column of our V of the next decision; and the values of all columns."""
    rewards, gamma, now, following = (case.ins[name] for name in ("r_t", "discount_t", "v_tm1", "v_t"))
    values = jnp.append(now, following[-1])
    ours = returns.td_errors(jnp.zeros_like(rewards), values, mask) + now  # V at the next decision
    return dialects.next_column_rewards(rewards, gamma, following, ours), values


def rlax_vtrace_of(case: Case, mask, **clips) -> returns.VTraceReturns:
    rewards, values = rlax_vtrace_facts(case, mask)
    hyper = case.hyper
    return returns.vtrace_returns(
        rewards,
        values,
        case.ins["rho_tm1"],
        mask,
        case.ins["discount_t"],
        hyper["lambda_"],
        hyper["clip_rho_threshold"],
        1.0,
        hyper.get("clip_pg_rho_threshold", 1.0),
        **clips,
    )


def rlax_vtrace(case: Case) -> dict:
    now, learned = case.ins["v_tm1"], case.ins["sample_mask"]
    errors = {mask: rlax_vtrace_of(case, x).targets - now for mask, x in {"all": all_of(now), "some": learned}.items()}
    return {"errors": errors["all"], "errors_masked": dialects.carried_back(errors["some"], learned)}


def rlax_vtrace_advantage(case: Case) -> dict:
    now = case.ins["v_tm1"]
    got = rlax_vtrace_of(case, all_of(now))
    clipped = jnp.minimum(case.hyper["clip_pg_rho_threshold"], case.ins["rho_tm1"])
    return {
        "errors": got.targets - now,
        "pg_advantage": got.advantages,
        "q_estimate": got.advantages / clipped + now,
    }


def rlax_td_errors(case: Case) -> dict:
    x = case.ins
    step = x["q_tm1"], x["a_tm1"], x["r_t"], x["discount_t"], x["q_t"]
    return {
        "td_learning": q_learning.td_learning(x["q_tm1"][:, 0], x["r_t"], x["discount_t"], x["q_t"][:, 0]),
        "q_learning": q_learning.q_learning(*step),
        "sarsa": q_learning.sarsa(*step, x["a_t"]),
        "expected_sarsa": q_learning.expected_sarsa(*step, x["probs_a_t"]),
        "double_q_learning": q_learning.double_q_learning(*step, x["q_t_selector"]),
    }


def rlax_policy_gradient(case: Case) -> dict:
    """rlax averages over the steps, whatever their weights are; `clipped` is a loss by the ratios."""
    one = jnp.ones_like(case.ins["w_t"])

    def policy(x):
        logp = logprobs.chosen_logp(x["logits_t"], x["a_t"], one)
        return (x["w_t"] * losses.policy_gradient(logp, x["adv_t"])).mean()

    def entropy(x):
        return -(x["w_t"] * logprobs.entropy(x["logits_t"], one)).mean()

    def clipped(x):
        epsilon = case.hyper["epsilon"]
        return losses.clipped_surrogate(x["prob_ratios_t"], x["adv_t"], epsilon, epsilon).mean()

    out = {}
    for names, loss, by in (
        (("pg_loss", "pg_grad"), policy, "logits_t"),
        (("entropy_loss", "entropy_grad"), entropy, "logits_t"),
        (("clipped", "clipped_grad"), clipped, "prob_ratios_t"),
    ):
        out |= dict(zip(names, gradient(loss, case.ins, by), strict=True))
    return out


# ---------------------------------------------------------------------------------------------- advantages of a critic


def whitened_gae(rewards, values, mask, gamma: float, lam: float) -> dict:
    """verl and tunix whiten inside; their targets are of the advantages before that."""
    values = jnp.pad(values, ((0, 0), (0, 1)))
    advantages = returns.gae(rewards, values, mask, gamma, lam)
    targets = returns.lambda_returns(rewards, values, mask, gamma, lam)
    whitened = dialects.verl_whitened(statistics.whiten(advantages, mask), advantages, mask)
    return {"advantages": whitened, "returns": targets}


def verl_gae(case: Case) -> dict:
    rewards, values = case.ins["token_level_rewards"], case.ins["values"]
    return whitened_gae(rewards, values, mask_of(case), case.hyper["gamma"], case.hyper["lam"])


def tunix_gae(case: Case) -> dict:
    mask = mask_of(case, "completion_mask")
    return whitened_gae(case.ins["rewards"], case.ins["values"], mask, case.hyper["gamma"], case.hyper["gae_lambda"])


def trl_ppo_rewards_gae(case: Case) -> dict:
    x, hyper = case.ins, case.hyper
    mask = jnp.arange(case.width)[None] <= x["sequence_lengths"][:, None]
    valued = dialects.score_one_late(mask)

    def unbounded_k3(logp, ref_logp):
        return dialects.unbounded_exponent(kl.k3(logp, ref_logp), logp, ref_logp)

    estimator = {"k1": kl.k1, "k3": unbounded_k3}[hyper["kl_estimator"]]
    penalty = shaping.apply_kl_penalty(
        jnp.zeros_like(x["logprobs"]), x["logprobs"], x["ref_logprobs"], mask, hyper["kl_coef"], estimator
    )
    rewards = penalty + shaping.at_last_decision(x["scores"], valued)
    if hyper["whiten_rewards"]:  # the mean is added back
        mean = statistics.masked_mean(rewards, valued)
        rewards = statistics.whiten(rewards, valued) + jnp.where(valued, mean, 0.0)
    values = jnp.pad(x["values"], ((0, 0), (0, 1)))
    advantages = returns.gae(rewards, values, valued, hyper["gamma"], hyper["lam"])
    return {
        "padding_mask": ~mask,
        "padding_mask_p1": ~valued,
        "rewards": rewards,
        "advantages": statistics.whiten(advantages, mask),
        "returns": returns.lambda_returns(rewards, values, valued, hyper["gamma"], hyper["lam"]),
    }


def critic_loss(case: Case, weight, terms, mask, values: str) -> tuple:
    def loss(ins):
        return jnp.where(mask, weight * terms(ins), 0.0).sum()

    return gradient(loss, case.ins, values)


def verl_value_loss(case: Case) -> dict:
    mask, clip = mask_of(case), case.hyper["cliprange_value"]

    def terms(x):
        return losses.clipped_value_loss(x["vpreds"], x["values"], x["returns"], clip)

    weight = verl_weights(case.hyper["loss_agg_mode"], mask, case.width)
    loss, slope = critic_loss(case, weight, terms, mask, "vpreds")
    outside = jnp.abs(case.ins["vpreds"] - case.ins["values"]) > clip  # inside both errors are one, but for rounding
    clipped = outside & (terms(case.ins) > losses.value_loss(case.ins["vpreds"], case.ins["returns"]))
    share = statistics.masked_mean(clipped.astype(float), mask)
    return {"loss": loss, "grad_vpreds": slope, "clipfrac": dialects.verl_mean(share, mask)}


def openrlhf_value_loss(case: Case) -> dict:
    mask, clip = mask_of(case, "action_mask"), case.hyper["clip_eps"]

    def terms(x):
        if clip is None:
            return losses.value_loss(x["values"], x["returns"])
        return losses.clipped_value_loss(x["values"], x["old_values"], x["returns"], clip)

    loss, slope = critic_loss(case, weights.token_mean(mask), terms, mask, "values")
    return {"loss": loss, "grad_values": slope}


# ------------------------------------------------------------------------------------------------------------- shaping


def openrlhf_compute_reward(case: Case) -> dict:
    """The KL comes as numbers: as k1 of them and 0. A coefficient below 0 counts as 0."""
    divergence, mask, clip = case.ins["kl"], mask_of(case, "action_mask"), case.hyper["reward_clip_range"]
    score = shaping.clip_rewards(case.ins["r"], *map(float, clip)) if clip else case.ins["r"]
    rewards = shaping.at_last_decision(score, mask)
    beta = max(case.hyper["kl_coef"], 0.0)
    return {"reward": shaping.apply_kl_penalty(rewards, divergence, jnp.zeros_like(divergence), mask, beta)}


def openrlhf_length_penalty(case: Case) -> dict:
    x, hyper = case.ins, case.hyper
    if "coef" in hyper:
        how = dialects.openrlhf_stop_properly(hyper["coef"])
        return {"rewards": shaping.truncation_penalty(x["rewards"], x["truncated"], **how)}
    punishment = shaping.soft_overlong_punishment(x["length"], hyper["max_new_tokens"], hyper["overlong_buffer_len"])
    return {"penalty": hyper["overlong_penalty_factor"] * punishment}


def trl_soft_overlong(case: Case) -> dict:
    limits = case.hyper["max_completion_len"], case.hyper["soft_punish_cache"]
    return {"reward": shaping.soft_overlong_punishment(case.ins["length"], *limits)}


def swift_soft_overlong(case: Case) -> dict:
    limits = case.hyper["soft_max_length"], case.hyper["soft_cache_length"]
    punishment = shaping.soft_overlong_punishment(case.ins["length"], *limits)
    return {"reward": dialects.uncapped_overlong(punishment, case.ins["length"], *limits)}


def verl_overlong(case: Case) -> dict:
    """On the last token of a row of so many; the score itself is 0."""
    lengths, limits = case.ins["length"], (case.hyper["max_resp_len"], case.hyper["len"])
    punishment = dialects.uncapped_overlong(shaping.soft_overlong_punishment(lengths, *limits), lengths, *limits)
    penalty = case.hyper["penalty_factor"] * punishment
    columns = jnp.arange(case.outs["reward_tensor"].shape[1])
    return {
        "penalty": penalty,
        "reward_tensor": shaping.at_last_decision(penalty, columns[None] < lengths[:, None]),
    }


def verl_adaptive_kl_controller(case: Case) -> dict:
    hyper, coefficients = case.hyper, [case.hyper["init_kl_coef"]]
    for measured in case.ins["current_kl"]:
        settings = hyper["target_kl"], hyper["horizon"], hyper["n_steps"]
        coefficients.append(adaptive_kl(coefficients[-1], measured, *settings))
    return {"value": jnp.stack(coefficients[1:])}


# --------------------------------------------------------------------------------------------------------- diagnostics


def trajectory(case: Case, mask, rewards, **fields) -> Trajectory:
    nothing = jnp.zeros_like(rewards)
    group = jnp.zeros(mask.shape[0], int)
    cut = dialects.verl_truncated(mask, case.width)
    cut &= sequences.last_decision(mask)
    return Trajectory(nothing, nothing, nothing, mask, group=group, rewards=rewards, truncated=cut, **fields)


def extent(prefix: str, x, mask) -> dict:
    reduce = {"mean": statistics.masked_mean, "max": statistics.masked_max, "min": statistics.masked_min}
    return {f"{prefix}/{name}": f(x, mask) for name, f in reduce.items()}


def verl_data_metrics(case: Case) -> dict:
    mask, x = mask_of(case), case.ins
    out = {}
    for prefix, rewards in (("critic/score", "token_level_scores"), ("critic/rewards", "token_level_rewards")):
        shown = metrics.rollout_metrics(trajectory(case, mask, x[rewards]), ())
        for name, ours in {"mean": "reward", "max": "reward_max", "min": "reward_min"}.items():
            out[f"{prefix}/{name}"] = shown[ours]

    values = jnp.pad(x["values"], ((0, 0), (0, 1)))
    traj = trajectory(case, mask, x["token_level_rewards"], values=values)
    credited = metrics.credit_metrics(Batch(traj=traj, advantages=x["advantages"], returns=x["returns"], mask=mask))
    for theirs, ours in {"advantages": "advantage", "returns": "return", "values": "value"}.items():
        for name, suffix in {"mean": "", "max": "_max", "min": "_min"}.items():
            out[f"critic/{theirs}/{name}"] = credited[ours + suffix]
    out["critic/vf_explained_var"] = credited["explained_variance"]

    lengths, answered = mask.sum(axis=1).astype(float), mask.any(axis=1)
    lengths_shown = {
        "response_length/mean": shown["length"],
        "response_length/max": shown["length_max"],
        "response_length/min": shown["length_min"],
        "response_length/clip_ratio": shown["truncated"],
        "response/aborted_ratio": shown["frac_empty"],
        "response_length_non_aborted/clip_ratio": statistics.masked_mean(
            (lengths == case.width).astype(float), answered
        ),
        **extent("response_length_non_aborted", lengths, answered),
    }
    return out | {name: jnp.float32(value) for name, value in lengths_shown.items()}  # verl counts in float32


def verl_offpolicy_metrics(case: Case) -> dict:
    mask = mask_of(case)
    pair = case.ins["old_log_prob"], case.ins["rollout_log_prob"]
    got = diagnostics.sampler_mismatch(*pair, mask)
    got_by_row = diagnostics.sampler_mismatch(*(dialects.verl_row_mean(x, mask) for x in pair), mask)
    rows = mask.any(axis=1)
    by_row = {  # ours, what verl counts for a row without decisions, how it reduces
        "training_ppl": ("perplexity_of_trainer", 1.0, "mean"),
        "training_log_ppl": ("log_perplexity_of_trainer", 0.0, "mean"),
        "rollout_ppl": ("perplexity", 1.0, "mean"),
        "rollout_log_ppl": ("log_perplexity", 0.0, "mean"),
        "log_ppl_diff": ("log_perplexity_gap", 0.0, "mean"),
        "log_ppl_abs_diff": ("log_perplexity_gap_size", 0.0, "mean"),
        "log_ppl_diff_max": ("log_perplexity_gap_max", 0.0, "max"),
        "log_ppl_diff_min": ("log_perplexity_gap_min", 0.0, "min"),
        "ppl_ratio": ("perplexity_ratio", 1.0, "mean"),
    }
    out = {
        "kl": dialects.verl_mean(got["kl"], mask),
        "k3_kl": dialects.verl_mean(got["kl_k3"], mask),
        "chi2_token": dialects.verl_mean(got["chi2"] + 1.0, mask) - 1.0,
        "chi2_seq": dialects.verl_rows_without_decisions(got["chi2_sequence"], rows, 0.0),
    }
    for theirs, (ours, empty, reduce) in by_row.items():
        out[theirs] = dialects.verl_rows_without_decisions(got_by_row[ours], rows, empty, reduce)
    return out


TABLE = {
    "openrlhf_approx_kl": Entry("ops.kl", openrlhf_approx_kl, rtol=1e-5),
    "tunix_kl": Entry("ops.kl", tunix_kl, rtol=1e-5),
    "verl_kl_penalty": Entry("ops.kl", verl_kl_penalty),
    "verl_new_kl_penalty": Entry("ops.kl", verl_kl_penalty),
    "verl_entropy": Entry("ops.logprobs.entropy", verl_entropy, mask="response_mask"),
    "verl_agg_loss": Entry("ops.weights", lambda case: verl_agg_loss(case, january=True), mask="loss_mask"),
    "verl_new_agg_loss": Entry("ops.weights", lambda case: verl_agg_loss(case, january=False), mask="loss_mask"),
    "tunix_aggregate_loss": Entry("ops.weights", tunix_aggregate_loss, rtol=1e-5, mask="completion_mask"),
    "rlax_discounted_returns": Entry("ops.returns.discounted_returns", rlax_discounted_returns),
    "rlax_gae": Entry("ops.returns.gae", rlax_gae),
    "rlax_importance_corrected_td": Entry("ops.returns", rlax_importance_corrected_td),
    "rlax_lambda_returns": Entry("ops.returns.lambda_returns", rlax_lambda_returns),
    "rlax_n_step_returns": Entry("ops.returns.n_step_returns", rlax_n_step_returns),
    "rlax_vtrace": Entry("ops.returns.vtrace_returns", rlax_vtrace),
    "rlax_vtrace_advantage": Entry("ops.returns.vtrace_returns", rlax_vtrace_advantage),
    "rlax_td_errors": Entry("ops.q_learning", rlax_td_errors),
    "rlax_policy_gradient": Entry("ops.losses", rlax_policy_gradient),
    "verl_gae": Entry("ops.returns.gae", verl_gae, mask="response_mask", at_mask=True),
    "tunix_gae": Entry("ops.returns.gae", tunix_gae, mask="completion_mask", at_mask=True),
    "trl_ppo_rewards_gae": Entry("ops.shaping, ops.returns.gae", trl_ppo_rewards_gae),
    "verl_value_loss": Entry("ops.losses.clipped_value_loss", verl_value_loss, mask="response_mask"),
    "openrlhf_value_loss": Entry("ops.losses.clipped_value_loss", openrlhf_value_loss, mask="action_mask"),
    "openrlhf_compute_reward": Entry(
        "ops.shaping", openrlhf_compute_reward, rtol=1e-5, mask="action_mask", at_mask=True
    ),
    "openrlhf_length_penalty": Entry("ops.shaping", openrlhf_length_penalty),
    "trl_soft_overlong": Entry("ops.shaping.soft_overlong_punishment", trl_soft_overlong),
    "swift_soft_overlong": Entry("ops.shaping.soft_overlong_punishment", swift_soft_overlong),
    "verl_overlong": Entry("ops.shaping.soft_overlong_punishment", verl_overlong, rtol=1e-5),
    "verl_adaptive_kl_controller": Entry("adaptive_kl", verl_adaptive_kl_controller),
    "verl_data_metrics": Entry(
        "train.metrics",
        verl_data_metrics,
        mask="response_mask",
        not_compared={"prompt_length/*": "of prompts that were not recorded"},
    ),
    "verl_offpolicy_metrics": Entry("train.diagnostics.sampler_mismatch", verl_offpolicy_metrics, mask="response_mask"),
}
